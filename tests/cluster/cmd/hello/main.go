// Hello is the pod of smoke.sh: it says its host name over HTTP, and asks
// another address when it is told to, so that pods can be made to call Services.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	client := http.Client{Timeout: 2 * time.Second}
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) {
		host, _ := os.Hostname()
		fmt.Fprintf(w, "hello from %s\n", host)
	})
	http.HandleFunc("GET /ask", func(w http.ResponseWriter, r *http.Request) {
		answer, err := client.Get(r.URL.Query().Get("url"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer answer.Body.Close()
		_, _ = io.Copy(w, answer.Body)
	})
	http.Handle("GET /files/", http.StripPrefix("/files/", http.FileServer(http.Dir("/data"))))
	log.Println("listening on :8080")
	log.Fatal(http.ListenAndServe(":8080", nil))
}
