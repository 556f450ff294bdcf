// Package render fills in the configuration files of the node's programs.
package render

import (
	"bytes"
	"embed"
	"encoding/base64"
	"os"
	"text/template"

	"stoker.dev/cluster/internal/settings"
)

//go:embed templates
var files embed.FS

var templates = template.Must(template.New("").Option("missingkey=error").ParseFS(files, "templates/*"))

// values are the settings and the constants that the templates name.
type values struct {
	settings.Settings
	Bridge, NodeAddress, PodRange, FirstPod, Node, Network, Cgroup, PauseImage string
	PortKubelet, PortKubeletAlive, PortProxyMetrics, PortProxyAlive            int
}

// Config renders containerd.toml, cni.conflist, kubelet.yaml or kube-proxy.yaml.
func Config(name string, s settings.Settings) ([]byte, error) {
	return execute(name, values{
		Settings: s, Bridge: settings.Bridge, NodeAddress: settings.NodeAddress, PodRange: settings.PodRange,
		FirstPod: settings.FirstPod, Node: settings.Node, Network: settings.Network, Cgroup: settings.Cgroup,
		PauseImage: settings.PauseImage, PortKubelet: settings.PortKubelet, PortKubeletAlive: settings.PortKubeletAlive,
		PortProxyMetrics: settings.PortProxyMetrics, PortProxyAlive: settings.PortProxyAlive,
	})
}

// Kubeconfig renders a kubeconfig with everything in it, for the client whose
// certificate is pki/user.crt.
func Kubeconfig(user string, s settings.Settings) ([]byte, error) {
	data := map[string]string{"Server": s.Server(), "User": user}
	for key, file := range map[string]string{"CA": "ca.crt", "Certificate": user + ".crt", "Key": user + ".key"} {
		content, err := os.ReadFile(s.PKI(file))
		if err != nil {
			return nil, err
		}
		data[key] = base64.StdEncoding.EncodeToString(content)
	}
	return execute("kubeconfig.yaml", data)
}

func execute(name string, data any) ([]byte, error) {
	var out bytes.Buffer
	err := templates.ExecuteTemplate(&out, name, data)
	return out.Bytes(), err
}
