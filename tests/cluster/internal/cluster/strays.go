package cluster

import (
	"os"
	"path/filepath"
	"strings"
)

// removeStrays removes what the node's programs put outside the cluster's own
// folders, in places that are fixed in them. What others may use goes only
// where it names this cluster, and folders only when they are empty then.
func (c *Cluster) removeStrays() {
	// The sockets of containerd's shims, noted beside each container.
	notes, _ := filepath.Glob(c.Run + "/containerd/io.containerd.runtime.v2.task/*/*/address")
	for _, note := range notes {
		if address, err := os.ReadFile(note); err == nil {
			_ = os.Remove(strings.TrimPrefix(string(address), "unix://"))
		}
	}
	// What the CNI library remembers of each network that it attached a pod to.
	results, _ := filepath.Glob("/var/lib/cni/results/*")
	for _, result := range results {
		if text, err := os.ReadFile(result); err == nil && strings.Contains(string(text), c.Run+"/") {
			_ = os.Remove(result)
		}
	}
	// The kubelet's links to its pods' logs.
	links, _ := filepath.Glob("/var/log/containers/*.log")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, c.State+"/") {
			_ = os.Remove(link)
		}
	}
	for _, path := range []string{
		// Of the kubelet's device manager; there is one kubelet a machine.
		"/var/lib/kubelet/device-plugins/kubelet.sock",
		"/var/lib/kubelet/device-plugins/kubelet_internal_checkpoint",
		"/var/lib/kubelet/device-plugins",
		"/var/lib/kubelet",
		"/var/lib/cni/results", "/var/lib/cni",
		"/var/log/containers",
		"/run/containerd/s", "/run/containerd",
		"/run/mount", // of the program mount
	} {
		_ = os.Remove(path)
	}
}
