package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"stoker.dev/cluster/internal/settings"
)

// Linked are the names under which this program stands in the bin folder.
var Linked = []string{
	"local-cluster", "kubectl", "helm",
	"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy",
}

// Up starts the cluster, or says that it runs.
func (c *Cluster) Up() error {
	if c.whyDown() == nil {
		fmt.Println("the local cluster runs already")
		fmt.Println(c.Export())
		return nil
	}
	if err := c.step("the machine has what it takes", "", "run `make prerequisites`", c.checkMachine); err != nil {
		return err
	}
	if c.left() {
		fmt.Println("clearing what an earlier run has left")
		if err := c.clear(); err != nil {
			return err
		}
	}
	for _, s := range []struct {
		what, log, advice string
		do                func() error
	}{
		{"folders, certificates and configuration", "", "check that the disk has room: `df -h " + c.State + "`", c.prepare},
		{"bridge, firewall and cgroups", "", "see what the kernel lacks: bridge, nftables and cgroups are needed", c.prepareKernel},
		{"containerd and etcd started", "containerd", again, func() error { return errors.Join(c.startContainerd(), c.startEtcd()) }},
		{"etcd answers", "etcd", again, c.etcdAnswers},
		{"API server started", "kube-apiserver", again, c.startAPIServer},
		{"containerd answers", "containerd", again, c.containerdAnswers},
		{"pause image imported", "containerd", again, c.importPauseImage},
		{"API server is ready", "kube-apiserver", again, c.apiServerReady},
		{"controllers, scheduler, kubelet and proxy started", "kubelet", again, func() error {
			return errors.Join(c.startControllers(), c.startKubelet(), c.startProxy())
		}},
		{"node is Ready", "kubelet", again, c.nodeReady},
		{"Services route", "kube-proxy", again, c.servicesRoute},
		{"namespaces are ready", "kube-controller-manager", again, c.namespacesReady},
		{fmt.Sprintf("node advertises %d %s", c.Settings.GPUs, settings.GPU), "kubelet", again, func() error { return c.setGPUs(c.Settings.GPUs) }},
	} {
		if err := c.step(s.what, s.log, s.advice, s.do); err != nil {
			return err
		}
	}
	fmt.Println(c.Export())
	return nil
}

const again = "read the log; `local-cluster up` clears everything and tries again"

// whyDown returns nil while the cluster runs and is of use.
func (c *Cluster) whyDown() error {
	for _, name := range daemons {
		if !c.alive(name) {
			return fmt.Errorf("%s does not run", name)
		}
	}
	if err := c.openAPI(); err != nil {
		return err
	}
	if err := c.get("/readyz", nil); err != nil {
		return err
	}
	n, err := c.node()
	if err == nil && !n.ready() {
		err = errors.New("the node is not ready: " + n.whyNotReady())
	}
	return err
}

// mustRun is for commands that need a running cluster.
func (c *Cluster) mustRun() error {
	if err := c.whyDown(); err != nil {
		return fmt.Errorf("the local cluster is down: %w. Start it with `make cluster-up`", err)
	}
	return nil
}

func (c *Cluster) checkMachine() error {
	for _, tool := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc", "ip", "nft", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is missing", tool)
		}
	}
	for _, path := range []string{"/usr/lib/cni/bridge", "/usr/lib/cni/host-local", filepath.Join(filepath.Dir(c.executable), "pause")} {
		if _, err := os.Stat(path); err != nil {
			return err
		}
	}
	ours, proxies, err := tables()
	if err == nil && !ours && len(proxies) > 0 {
		err = errors.New("another cluster's kube-proxy works on this machine (nft table kube-proxy): stop it first")
	}
	return err
}

func (c *Cluster) prepare() error {
	for _, dir := range []string{
		c.PKI(""), c.Config("cni"), c.Data("logs"), c.Data("bin"), c.Data("images"), c.Data("pod-logs"), c.Models(), c.Pids(),
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for _, name := range Linked {
		if err := os.Symlink(c.executable, c.Bin(name)); err != nil {
			return err
		}
	}
	return errors.Join(c.writeCertificates(), c.writeConfiguration())
}

func (c *Cluster) prepareKernel() error {
	return errors.Join(c.setSysctls(), c.makeNetwork(), makeCgroups())
}
