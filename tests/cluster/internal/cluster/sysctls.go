package cluster

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// What the cluster needs set, and what the kubelet sets by itself.
var (
	needed = map[string]string{
		"net/ipv4/ip_forward":                "1",
		"net/bridge/bridge-nf-call-iptables": "1", // Services between pods on the bridge
	}
	setByKubelet = []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	}
)

// setSysctls notes the machine's values and sets what the cluster needs.
func (c *Cluster) setSysctls() error {
	if _, err := os.Stat(sysctl("net/bridge/bridge-nf-call-iptables")); err != nil {
		// A module on some kernels, built in on others; the write below tells.
		_ = exec.Command("modprobe", "br_netfilter").Run()
	}
	before := map[string]string{}
	names := slices.Clone(setByKubelet)
	for name := range needed {
		names = append(names, name)
	}
	for _, name := range names {
		if value, err := os.ReadFile(sysctl(name)); err == nil {
			before[name] = strings.TrimSpace(string(value))
		}
	}
	text, err := json.MarshalIndent(before, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.sysctlNote(), text, 0o644); err != nil {
		return err
	}
	for name, value := range needed {
		if err := os.WriteFile(sysctl(name), []byte(value), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// restoreSysctls puts the noted values back.
func (c *Cluster) restoreSysctls() error {
	text, err := os.ReadFile(c.sysctlNote())
	if err != nil {
		return nil // none were changed
	}
	var before map[string]string
	if err := json.Unmarshal(text, &before); err != nil {
		return os.Remove(c.sysctlNote()) // cut short while it was written: nothing was set yet
	}
	for name, value := range before {
		if now, err := os.ReadFile(sysctl(name)); err == nil && strings.TrimSpace(string(now)) != value {
			if err := os.WriteFile(sysctl(name), []byte(value), 0o644); err != nil {
				return err
			}
		}
	}
	return os.Remove(c.sysctlNote())
}

func (c *Cluster) sysctlNote() string { return c.Data("sysctls.json") }

func sysctl(name string) string { return filepath.Join("/proc/sys", name) }
