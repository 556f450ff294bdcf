// Package cluster starts and stops a one-node Kubernetes cluster on this
// machine, from the components in this very program and Debian's containerd.
package cluster

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"syscall"

	"stoker.dev/cluster/internal/process"
	"stoker.dev/cluster/internal/settings"
)

// daemons in the order in which they are started.
var daemons = []string{
	"containerd", "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy",
}

// Cluster is the local cluster: there is one a machine.
type Cluster struct {
	settings.Settings
	executable string   // this program; the components are in it
	locked     *os.File // held open: its lock goes when it is closed, by the collector too
	progress   progress
	api        *http.Client
}

// Look is for commands that change nothing.
func Look(s settings.Settings) (*Cluster, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("the local cluster needs root: it makes a bridge, mounts and cgroups. Run this as root")
	}
	executable, err := os.Executable()
	return &Cluster{Settings: s, executable: executable}, err
}

// Open takes the lock that keeps two commands from changing the cluster at once.
func Open(s settings.Settings) (*Cluster, error) {
	c, err := Look(s)
	if err != nil {
		return nil, err
	}
	return c, c.lock()
}

func (c *Cluster) lock() error {
	if err := os.MkdirAll(filepath.Dir(c.Run), 0o755); err != nil {
		return err
	}
	path := c.lockFile()
	for {
		file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		if syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
			fmt.Println("waiting for another local-cluster command to end")
			if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil {
				return fmt.Errorf("locking %s: %w", path, err)
			}
		}
		// `down` removes the file: a lock on a removed file keeps nobody out.
		held, err1 := file.Stat()
		there, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(held, there) {
			c.locked = file
			return nil
		}
		file.Close()
	}
}

func (c *Cluster) lockFile() string { return c.Run + ".lock" }

// alive says whether a daemon that was started still runs.
func (c *Cluster) alive(name string) bool {
	id, ok := process.Recorded(c.Pids())[name]
	return ok && id.Alive()
}

// start runs a daemon in the background and records which process it is.
func (c *Cluster) start(name, path string, args ...string) error {
	id, err := process.Daemon{Path: path, Name: name, Args: args, Log: c.Log(name), Dir: c.State}.Start()
	if err != nil {
		return err
	}
	return id.Save(c.Pids(), name)
}

// component starts one of the programs inside this one.
func (c *Cluster) component(name string, args ...string) error {
	return c.start(name, c.Bin(name), args...)
}
