package render

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"stoker.dev/cluster/internal/settings"
)

var elsewhere = settings.Settings{State: "/srv/a/state", Run: "/srv/a/run"}

func TestEveryFileFollowsTheFolders(t *testing.T) {
	for name, wanted := range map[string][]string{
		"containerd.toml": {`root = "/srv/a/state/containerd"`, `address = "/srv/a/run/containerd.sock"`, settings.PauseImage},
		"kubelet.yaml":    {"unix:///srv/a/run/containerd.sock", "/srv/a/state/pki/ca.crt", "cgroupRoot: /" + settings.Cgroup},
		"kube-proxy.yaml": {"/srv/a/state/config/kube-proxy.kubeconfig", settings.PodRange},
		"cni.conflist":    {`"/srv/a/state/addresses"`, settings.Bridge},
	} {
		text, err := Config(name, elsewhere)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, part := range wanted {
			if !strings.Contains(string(text), part) {
				t.Errorf("%s lacks %q", name, part)
			}
		}
		if strings.Contains(string(text), "/var/lib/") || strings.Contains(string(text), "<no value>") {
			t.Errorf("%s:\n%s", name, text)
		}
	}
}

func TestNetworkConfigurationIsJSON(t *testing.T) {
	text, err := Config("cni.conflist", elsewhere)
	if err != nil || !json.Valid(text) {
		t.Fatalf("%v\n%s", err, text)
	}
}

func TestKubeconfigHoldsItsCertificates(t *testing.T) {
	s := settings.Settings{State: t.TempDir()}
	if err := os.MkdirAll(s.PKI(""), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Kubeconfig("admin", s); err == nil {
		t.Error("rendered without a certificate")
	}
	for _, f := range []string{"ca.crt", "admin.crt", "admin.key"} {
		if err := os.WriteFile(filepath.Join(s.State, "pki", f), []byte("of "+f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text, err := Kubeconfig("admin", s)
	if err != nil || !strings.Contains(string(text), "client-key-data: b2YgYWRtaW4ua2V5") {
		t.Fatalf("%v\n%s", err, text)
	}
}
