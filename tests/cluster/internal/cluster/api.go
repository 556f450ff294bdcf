package cluster

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"stoker.dev/cluster/internal/settings"
)

const nodePath = "/api/v1/nodes/" + settings.Node

// openAPI makes the client that asks the API server as the administrator. Plain
// HTTP is enough for the few questions asked here.
func (c *Cluster) openAPI() error {
	pair, err := tls.LoadX509KeyPair(c.PKI(admin+".crt"), c.PKI(admin+".key"))
	if err != nil {
		return err
	}
	authority, err := os.ReadFile(c.PKI("ca.crt"))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(authority)
	c.api = &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool}},
	}
	return nil
}

// get decodes the answer into v, unless that is nil.
func (c *Cluster) get(path string, v any) error {
	return c.ask(http.MethodGet, path, "", nil, v)
}

func (c *Cluster) ask(method, path, kind string, body []byte, v any) error {
	request, err := http.NewRequest(method, c.Server()+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if kind != "" {
		request.Header.Set("Content-Type", kind)
	}
	response, err := c.api.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, 16<<20))
	if err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %.300s", method, path, response.Status, text)
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(text, v)
}

// node holds what is read of a Node.
type node struct {
	Spec   struct{ Taints []struct{ Key string } }
	Status struct {
		Capacity, Allocatable map[string]string
		Conditions            []struct{ Type, Status, Message string }
	}
}

func (c *Cluster) node() (n node, err error) {
	err = c.get(nodePath, &n)
	return n, err
}

func (n node) ready() bool { return n.whyNotReady() == "" }

func (n node) whyNotReady() string {
	for _, condition := range n.Status.Conditions {
		if condition.Type == "Ready" {
			if condition.Status == "True" {
				return ""
			}
			return condition.Message
		}
	}
	return "it has not reported yet"
}
