package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"stoker.dev/cluster/internal/archive"
	"stoker.dev/cluster/internal/settings"
)

func (c *Cluster) startContainerd() error {
	path, err := exec.LookPath("containerd")
	if err != nil {
		return err
	}
	return c.start("containerd", path, "--config="+c.Config("containerd.toml"))
}

func (c *Cluster) containerdAnswers() error {
	return c.await("containerd", 30*time.Second, func() error {
		_, err := c.ctr("version")
		return err
	})
}

// importPauseImage makes the image that holds every pod's namespaces out of the
// program beside this one.
func (c *Cluster) importPauseImage() error {
	file := c.Data("pause.tar")
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer os.Remove(file)
	image := archive.Image{Name: settings.PauseImage, Program: filepath.Join(filepath.Dir(c.executable), "pause")}
	if err := image.Write(out); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	_, err = c.ctr("images", "import", file)
	return err
}

func (c *Cluster) startKubelet() error {
	return c.component("kubelet",
		"--config="+c.Config("kubelet.yaml"), "--kubeconfig="+c.Config("kubelet.kubeconfig"),
		"--root-dir="+c.Data("kubelet"), "--cert-dir="+c.Data("kubelet/pki"),
		"--hostname-override="+settings.Node, "--node-ip="+settings.NodeAddress,
	)
}

func (c *Cluster) startProxy() error {
	return c.component("kube-proxy", "--config="+c.Config("kube-proxy.yaml"))
}

// nodeReady waits until pods can be placed on the node. Asking the kubelet by
// way of the API server checks their certificates too, and that its loop runs.
func (c *Cluster) nodeReady() error {
	return c.await("kubelet", 60*time.Second, func() error {
		n, err := c.node()
		if err != nil {
			return err
		}
		if !n.ready() {
			return fmt.Errorf("the node says: %s", n.whyNotReady())
		}
		for _, t := range n.Spec.Taints {
			return fmt.Errorf("the node still has the taint %s", t.Key)
		}
		return c.get(nodePath+"/proxy/healthz", nil)
	})
}

// servicesRoute waits until the API server answers at its Service's address.
func (c *Cluster) servicesRoute() error {
	return c.await("kube-proxy", 30*time.Second, func() error { return dial(settings.APIService, 443) })
}

// ctr runs containerd's command line against the cluster's own containerd.
func (c *Cluster) ctr(args ...string) (string, error) {
	return run("ctr", append([]string{"--address", c.Socket(), "--namespace", "k8s.io"}, args...)...)
}

// run returns what a command prints; its error says what it complained of.
func run(name string, args ...string) (string, error) {
	var complaint strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return string(out), err
}
