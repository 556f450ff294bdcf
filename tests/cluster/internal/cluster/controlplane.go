package cluster

import (
	"fmt"
	"net"
	"strconv"
	"time"

	"stoker.dev/cluster/internal/settings"
)

func (c *Cluster) startEtcd() error {
	address := func(port int) string { return fmt.Sprintf("https://%s:%d", settings.NodeAddress, port) }
	return c.component("etcd",
		"--name=stoker", "--data-dir="+c.Data("etcd"), "--log-level=warn",
		"--listen-client-urls="+address(settings.PortEtcd), "--advertise-client-urls="+address(settings.PortEtcd),
		"--listen-peer-urls="+address(settings.PortEtcdPeer), "--initial-advertise-peer-urls="+address(settings.PortEtcdPeer),
		"--initial-cluster=stoker="+address(settings.PortEtcdPeer),
		"--client-cert-auth", "--trusted-ca-file="+c.PKI("ca.crt"),
		"--cert-file="+c.PKI("etcd.crt"), "--key-file="+c.PKI("etcd.key"),
		"--peer-client-cert-auth", "--peer-trusted-ca-file="+c.PKI("ca.crt"),
		"--peer-cert-file="+c.PKI("etcd.crt"), "--peer-key-file="+c.PKI("etcd.key"),
		// What a power cut would lose is thrown away by the next `up` anyway.
		"--unsafe-no-fsync",
	)
}

func (c *Cluster) etcdAnswers() error {
	return c.await("etcd", 30*time.Second, func() error {
		return dial(settings.NodeAddress, settings.PortEtcd)
	})
}

func (c *Cluster) startAPIServer() error {
	return c.component("kube-apiserver",
		"--etcd-servers="+fmt.Sprintf("https://%s:%d", settings.NodeAddress, settings.PortEtcd),
		"--etcd-cafile="+c.PKI("ca.crt"),
		"--etcd-certfile="+c.PKI("kube-apiserver-etcd.crt"), "--etcd-keyfile="+c.PKI("kube-apiserver-etcd.key"),
		// Only the bridge: nothing outside this machine can reach it.
		"--bind-address="+settings.NodeAddress, "--advertise-address="+settings.NodeAddress,
		"--secure-port="+strconv.Itoa(settings.PortAPIServer),
		"--tls-cert-file="+c.PKI("kube-apiserver.crt"), "--tls-private-key-file="+c.PKI("kube-apiserver.key"),
		"--client-ca-file="+c.PKI("ca.crt"),
		"--kubelet-certificate-authority="+c.PKI("ca.crt"),
		"--kubelet-client-certificate="+c.PKI("kube-apiserver-kubelet.crt"), "--kubelet-client-key="+c.PKI("kube-apiserver-kubelet.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file="+c.PKI("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file="+c.PKI("front-proxy.crt"), "--proxy-client-key-file="+c.PKI("front-proxy.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+c.PKI("service-accounts.pub"), "--service-account-signing-key-file="+c.PKI("service-accounts.key"),
		"--service-cluster-ip-range="+settings.ServiceRange,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--allow-privileged", "--profiling=false",
	)
}

func (c *Cluster) apiServerReady() error {
	if err := c.openAPI(); err != nil {
		return err
	}
	return c.await("kube-apiserver", 90*time.Second, func() error { return c.get("/readyz", nil) })
}

// startControllers starts what works on the API's objects. They end when the
// API server is not ready yet, so it must be.
func (c *Cluster) startControllers() error {
	common := func(name string) []string {
		config := c.Config(name + ".kubeconfig")
		return []string{
			"--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config,
			"--bind-address=" + settings.NodeAddress, "--leader-elect=false", "--profiling=false",
			// With the usual 20 requests a second, a hundred pods take 20 s.
			"--kube-api-qps=300", "--kube-api-burst=600",
		}
	}
	manager := append(common("kube-controller-manager"),
		"--root-ca-file="+c.PKI("ca.crt"), "--service-account-private-key-file="+c.PKI("service-accounts.key"),
		"--cluster-signing-cert-file="+c.PKI("ca.crt"), "--cluster-signing-key-file="+c.PKI("ca.key"),
		"--flex-volume-plugin-dir="+c.Data("volume-plugins"),
		"--use-service-account-credentials")
	if err := c.component("kube-controller-manager", manager...); err != nil {
		return err
	}
	return c.component("kube-scheduler", common("kube-scheduler")...)
}

// namespacesReady waits for what pods need of the controllers: the service
// account of the namespace and the certificate that it checks the API server by.
func (c *Cluster) namespacesReady() error {
	return c.await("kube-controller-manager", 60*time.Second, func() error {
		if err := c.get("/api/v1/namespaces/default/serviceaccounts/default", nil); err != nil {
			return err
		}
		return c.get("/api/v1/namespaces/default/configmaps/kube-root-ca.crt", nil)
	})
}

func dial(host string, port int) error {
	connection, err := net.DialTimeout("tcp", net.JoinHostPort(host, strconv.Itoa(port)), time.Second)
	if err != nil {
		return err
	}
	return connection.Close()
}
