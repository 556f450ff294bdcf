// Package settings says where the local cluster lives: its folders, addresses
// and names. Everything else asks here.
package settings

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// Addresses. All come from the range set aside for benchmarks (RFC 2544), which
// no real network routes.
const (
	Bridge       = "stoker0"
	NodeAddress  = "198.18.0.1" // of the bridge: pods' gateway, node and API server
	PodRange     = "198.18.0.0/16"
	FirstPod     = "198.18.0.10"
	ServiceRange = "198.19.0.0/16"
	APIService   = "198.19.0.1" // the `kubernetes` Service
	PrefixLength = 16
)

// Names.
const (
	Node       = "stoker-node"
	Network    = "stoker-cluster" // of the CNI network and of the firewall's table
	Cgroup     = "stoker-cluster" // the kubelet keeps every pod below it
	PauseImage = "stoker/pause:1"
	GPU        = "nvidia.com/gpu"
	Kubernetes = "v1.36.3"
	Helm       = "v4.3.1"
)

// Ports, all on NodeAddress.
const (
	PortAPIServer    = 6443
	PortEtcd         = 2379
	PortEtcdPeer     = 2380
	PortKubelet      = 10250
	PortKubeletAlive = 10248
	PortProxyMetrics = 10249
	PortProxyAlive   = 10256
)

// Settings are what a person can choose.
type Settings struct {
	State string // kept over a crash: certificates, etcd, images, logs
	Run   string // sockets, mounts and the record of running processes
	GPUs  int    // advertised by the node
}

// FromEnvironment reads STOKER_CLUSTER_STATE, STOKER_CLUSTER_RUN and
// STOKER_CLUSTER_GPUS.
func FromEnvironment() (Settings, error) {
	s := Settings{State: "/var/lib/stoker-cluster", Run: "/run/stoker-cluster", GPUs: 4}
	if v := os.Getenv("STOKER_CLUSTER_STATE"); v != "" {
		s.State = v
	}
	if v := os.Getenv("STOKER_CLUSTER_RUN"); v != "" {
		s.Run = v
	}
	if v := os.Getenv("STOKER_CLUSTER_GPUS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 {
			return s, fmt.Errorf("STOKER_CLUSTER_GPUS is %q: give a number of GPUs, 0 or more", v)
		}
		s.GPUs = n
	}
	for name, dir := range map[string]string{"STOKER_CLUSTER_STATE": s.State, "STOKER_CLUSTER_RUN": s.Run} {
		// `down` removes these folders whole, so they must be the cluster's own.
		if clean := filepath.Clean(dir); !filepath.IsAbs(dir) || filepath.Dir(clean) == "/" {
			return s, fmt.Errorf("%s is %q: give an absolute path at least two folders deep; `down` removes it whole", name, dir)
		}
	}
	return s, nil
}

func (s Settings) PKI(name string) string    { return filepath.Join(s.State, "pki", name) }
func (s Settings) Config(name string) string { return filepath.Join(s.State, "config", name) }
func (s Settings) Log(name string) string    { return filepath.Join(s.State, "logs", name+".log") }
func (s Settings) Bin(name string) string    { return filepath.Join(s.State, "bin", name) }
func (s Settings) Data(name string) string   { return filepath.Join(s.State, name) }
func (s Settings) Models() string            { return filepath.Join(s.State, "models") }
func (s Settings) Kubeconfig() string        { return filepath.Join(s.State, "kubeconfig") }
func (s Settings) Socket() string            { return filepath.Join(s.Run, "containerd.sock") }
func (s Settings) Pids() string              { return filepath.Join(s.Run, "pids") }

// Server is the API server's address.
func (s Settings) Server() string {
	return fmt.Sprintf("https://%s:%d", NodeAddress, PortAPIServer)
}

// Export is the line that points a shell at the cluster and its tools.
func (s Settings) Export() string {
	return fmt.Sprintf("export KUBECONFIG=%s PATH=%s:$PATH", s.Kubeconfig(), s.Data("bin"))
}
