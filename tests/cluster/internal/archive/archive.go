// Package archive writes and reads images as docker-archive files, the form
// that `docker save` writes and every importer reads. It makes the images that
// the cluster itself needs, which no registry is asked for.
package archive

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"
)

// Image is one static program with nothing around it.
type Image struct {
	Name    string // repository:tag
	Program string // path of the file; it becomes /NAME in the image
}

// User is who the program runs as; a number, so that Kubernetes can tell it is
// not root.
const User = "65532"

type manifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// Write writes the image. The same program gives the same bytes.
func (i Image) Write(w io.Writer) error {
	program, err := os.ReadFile(i.Program)
	if err != nil {
		return err
	}
	entry := "/" + path.Base(i.Program)
	var layer bytes.Buffer
	if err := writeTar(&layer, file{entry[1:], program, 0o755}); err != nil {
		return err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": []string{entry}, "User": User},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer.Bytes())}},
	})
	if err != nil {
		return err
	}
	m := []manifest{{digest(config) + ".json", []string{i.Name}, []string{"layer.tar"}}}
	index, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return writeTar(w, file{m[0].Config, config, 0o644}, file{"layer.tar", layer.Bytes(), 0o644}, file{"manifest.json", index, 0o644})
}

// Identify returns the names in an archive and the digest of the image's
// configuration, which names its content: layers, command and all.
func Identify(r io.Reader) (names []string, id string, err error) {
	for t := tar.NewReader(r); ; {
		header, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil, "", errors.New("there is no manifest.json in it: not a docker-archive")
		}
		if err != nil {
			return nil, "", err
		}
		if header.Name != "manifest.json" {
			continue
		}
		var m []manifest
		if err := json.NewDecoder(t).Decode(&m); err != nil {
			return nil, "", fmt.Errorf("manifest.json: %w", err)
		}
		if len(m) != 1 || len(m[0].RepoTags) == 0 {
			return nil, "", fmt.Errorf("manifest.json holds %d images: one with a name is needed", len(m))
		}
		return m[0].RepoTags, strings.TrimSuffix(path.Base(m[0].Config), ".json"), nil
	}
}

type file struct {
	name    string
	content []byte
	mode    int64
}

func writeTar(w io.Writer, files ...file) error {
	t := tar.NewWriter(w)
	for _, f := range files {
		if err := t.WriteHeader(&tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.content))}); err != nil {
			return err
		}
		if _, err := t.Write(f.content); err != nil {
			return err
		}
	}
	return t.Close()
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
