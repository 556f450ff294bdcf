package pki

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
)

func issued(t *testing.T, r Request) (*x509.Certificate, *x509.CertPool) {
	t.Helper()
	dir := t.TempDir()
	ca, err := NewAuthority(dir, "ca")
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.Issue(dir, "leaf", r); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "leaf.crt"), filepath.Join(dir, "leaf.key"))
	if err != nil {
		t.Fatal(err)
	}
	authority, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authority) {
		t.Fatal("the authority's certificate can't be read")
	}
	return pair.Leaf, pool
}

func TestServerCertificateChainsAndNamesItsAddresses(t *testing.T) {
	leaf, pool := issued(t, Request{CommonName: "kube-apiserver", Names: []string{"kubernetes.default.svc", "198.19.0.1"}})
	for _, name := range []string{"kubernetes.default.svc", "198.19.0.1"} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := leaf.VerifyHostname("198.19.0.2"); err == nil {
		t.Error("an address that was not asked for is accepted")
	}
}

func TestClientCertificateCarriesUserAndGroupAndServesNothing(t *testing.T) {
	leaf, pool := issued(t, Request{CommonName: "system:node:a", Organizations: []string{"system:nodes"}})
	if leaf.Subject.CommonName != "system:node:a" || leaf.Subject.Organization[0] != "system:nodes" {
		t.Errorf("subject is %v", leaf.Subject)
	}
	client := x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if _, err := leaf.Verify(client); err != nil {
		t.Error(err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool}); err == nil {
		t.Error("a client's certificate is good for a server")
	}
	if leaf.IsCA {
		t.Error("a leaf can sign")
	}
}

func TestOneAuthorityDoesNotVouchForAnother(t *testing.T) {
	leaf, _ := issued(t, Request{CommonName: "x", Names: []string{"x"}})
	_, other := issued(t, Request{CommonName: "y", Names: []string{"y"}})
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: other}); err == nil {
		t.Fatal("accepted")
	}
}

func TestKeysAreNotReadableByOthers(t *testing.T) {
	dir := t.TempDir()
	if err := WriteSigningKey(dir, "sa"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, "sa.key"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	if _, err := os.Stat(filepath.Join(dir, "sa.pub")); err != nil {
		t.Fatal(err)
	}
}
