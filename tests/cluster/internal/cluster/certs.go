package cluster

import (
	"os"

	"stoker.dev/cluster/internal/pki"
	"stoker.dev/cluster/internal/render"
	"stoker.dev/cluster/internal/settings"
)

// admin is the user of the kubeconfig that a person gets.
const admin = "stoker-admin"

var clients = map[string]pki.Request{
	admin:                     {CommonName: admin, Organizations: []string{"system:masters"}},
	"kube-apiserver-kubelet":  {CommonName: "kube-apiserver-kubelet", Organizations: []string{"system:masters"}},
	"kube-apiserver-etcd":     {CommonName: "kube-apiserver-etcd"},
	"kube-controller-manager": {CommonName: "system:kube-controller-manager"},
	"kube-scheduler":          {CommonName: "system:kube-scheduler"},
	"kubelet":                 {CommonName: "system:node:" + settings.Node, Organizations: []string{"system:nodes"}},
	"kube-proxy":              {CommonName: "system:kube-proxy"},
}

var servers = map[string]pki.Request{
	"etcd":           {CommonName: "etcd", Names: []string{settings.NodeAddress}},
	"kubelet-server": {CommonName: settings.Node, Names: []string{settings.Node, settings.NodeAddress}},
	"kube-apiserver": {CommonName: "kube-apiserver", Names: []string{
		settings.NodeAddress, settings.APIService,
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}},
}

// writeCertificates makes every certificate anew: they are cheap, and old ones
// would be one more thing to check.
func (c *Cluster) writeCertificates() error {
	dir := c.PKI("")
	ca, err := pki.NewAuthority(dir, "ca")
	if err != nil {
		return err
	}
	for _, requests := range []map[string]pki.Request{clients, servers} {
		for name, request := range requests {
			if err := ca.Issue(dir, name, request); err != nil {
				return err
			}
		}
	}
	// Extension API servers trust user names that come with this certificate,
	// so it has an authority of its own that signs nothing else.
	front, err := pki.NewAuthority(dir, "front-proxy-ca")
	if err != nil {
		return err
	}
	if err := front.Issue(dir, "front-proxy", pki.Request{CommonName: "front-proxy"}); err != nil {
		return err
	}
	return pki.WriteSigningKey(dir, "service-accounts")
}

// writeConfiguration writes what the components read.
func (c *Cluster) writeConfiguration() error {
	for name, path := range map[string]string{
		"containerd.toml": c.Config("containerd.toml"),
		"cni.conflist":    c.Config("cni/stoker-cluster.conflist"),
		"kubelet.yaml":    c.Config("kubelet.yaml"),
		"kube-proxy.yaml": c.Config("kube-proxy.yaml"),
	} {
		text, err := render.Config(name, c.Settings)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return err
		}
	}
	for user, path := range map[string]string{
		admin:                     c.Kubeconfig(),
		"kube-controller-manager": c.Config("kube-controller-manager.kubeconfig"),
		"kube-scheduler":          c.Config("kube-scheduler.kubeconfig"),
		"kubelet":                 c.Config("kubelet.kubeconfig"),
		"kube-proxy":              c.Config("kube-proxy.kubeconfig"),
	} {
		text, err := render.Kubeconfig(user, c.Settings)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, text, 0o600); err != nil {
			return err
		}
	}
	return nil
}
