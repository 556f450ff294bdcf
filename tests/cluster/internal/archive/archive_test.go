package archive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func written(t *testing.T) []byte {
	t.Helper()
	program := filepath.Join(t.TempDir(), "hello")
	if err := os.WriteFile(program, []byte("a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := (Image{"stoker/hello:1", program}).Write(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestWhatIsWrittenIsIdentified(t *testing.T) {
	names, id, err := Identify(bytes.NewReader(written(t)))
	if err != nil || len(names) != 1 || names[0] != "stoker/hello:1" || len(id) != 64 {
		t.Fatalf("got %v %q %v", names, id, err)
	}
}

func TestTheSameProgramGivesTheSameBytes(t *testing.T) {
	if !bytes.Equal(written(t), written(t)) {
		t.Fatal("they differ")
	}
}

func TestConfigurationNamesTheLayerAndANumericUser(t *testing.T) {
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(written(t))); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name], _ = io.ReadAll(r)
	}
	var m []manifest
	if err := json.Unmarshal(files["manifest.json"], &m); err != nil {
		t.Fatal(err)
	}
	var config struct {
		Config struct{ User string }
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(files[m[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	if config.Rootfs.DiffIDs[0] != "sha256:"+digest(files[m[0].Layers[0]]) || config.Config.User != User {
		t.Fatalf("configuration is %s", files[m[0].Config])
	}
	if digest(files[m[0].Config])+".json" != m[0].Config {
		t.Error("the configuration is not under its own digest")
	}
}

func TestAnotherTarIsRefused(t *testing.T) {
	var out bytes.Buffer
	if err := writeTar(&out, file{"x", []byte("y"), 0o644}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Identify(&out); err == nil {
		t.Fatal("accepted")
	}
}
