package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"stoker.dev/cluster/internal/process"
	"stoker.dev/cluster/internal/settings"
)

const clearAdvice = "look at what holds it (`mount`, `ip link`, `ps`), then run `local-cluster down` again"

// Down removes every trace of the cluster.
func (c *Cluster) Down() error {
	if err := c.clear(); err != nil {
		return err
	}
	if err := c.step("removed "+c.State+" and "+c.Run, "", clearAdvice, func() error {
		return errors.Join(os.RemoveAll(c.State), os.RemoveAll(c.Run))
	}); err != nil {
		return err
	}
	return os.Remove(c.lockFile())
}

// clear removes what a cluster, running or killed, has left on the machine, and
// its state but for the models. Each step is harmless where there is nothing.
func (c *Cluster) clear() error {
	for _, s := range []struct {
		what string
		do   func() error
	}{
		{"no daemon runs", c.endDaemons},
		{"no container runs", func() error { return errors.Join(c.endShims(), removeCgroups()) }},
		{"nothing is mounted", c.unmountAll},
		{"no bridge, route or firewall table", c.removeNetwork},
		{"system settings are as they were", c.restoreSysctls},
		{"no old state", c.removeState},
	} {
		if err := c.step(s.what, "", clearAdvice, s.do); err != nil {
			return err
		}
	}
	return nil
}

// left says whether there is anything to clear.
func (c *Cluster) left() bool {
	for _, path := range []string{c.Run, c.Data("etcd"), "/sys/class/net/" + settings.Bridge} {
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	return false
}

func (c *Cluster) endDaemons() error {
	recorded := process.Recorded(c.Pids())
	// The latest first: a kubelet that lost its containerd would only complain.
	for _, name := range slices.Backward(daemons) {
		if id, ok := recorded[name]; ok {
			if err := id.Kill(10 * time.Second); err != nil {
				return err
			}
		}
	}
	return nil
}

// endShims ends the processes that containerd leaves beside each pod. They are
// not recorded here, but name the socket of their containerd.
func (c *Cluster) endShims() error {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		text, _ := os.ReadFile(file)
		args := strings.Split(string(text), "\x00")
		at := slices.Index(args, "-address")
		if !strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") || at < 0 || args[at+1] != c.Socket() {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			continue
		}
		if id, err := process.Of(pid); err == nil {
			if err := id.Kill(10 * time.Second); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Cluster) removeState() error {
	c.removeStrays()
	entries, _ := os.ReadDir(c.State)
	for _, entry := range entries {
		if path := c.Data(entry.Name()); path != c.Models() {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(c.Run)
}
