package cluster

import (
	"fmt"
	"os/exec"
	"strings"

	"stoker.dev/cluster/internal/settings"
)

// makeNetwork makes the bridge that every pod hangs on. Its address is the
// node's, so that the API server and Services are reached the same way from
// pods and from this machine, and nothing depends on the machine's own network.
func (c *Cluster) makeNetwork() error {
	address := fmt.Sprintf("%s/%d", settings.NodeAddress, settings.PrefixLength)
	for _, args := range [][]string{
		{"link", "add", settings.Bridge, "type", "bridge"},
		{"address", "add", address, "dev", settings.Bridge},
		{"link", "set", settings.Bridge, "up"},
		// Without it, a connection to a Service that has no rule yet would leave
		// the machine by the default route.
		{"route", "add", settings.ServiceRange, "dev", settings.Bridge, "src", settings.NodeAddress},
	} {
		if _, err := run("ip", args...); err != nil {
			return err
		}
	}
	// Pods reach each other and this machine, and nothing else; nothing else
	// reaches them.
	return nft(fmt.Sprintf(`
table inet %s {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname %[2]q oifname != %[2]q reject
		iifname != %[2]q oifname %[2]q drop
	}
}`, settings.Network, settings.Bridge))
}

// removeNetwork removes the bridge with what hangs on it, and the firewall's
// tables. Routes go with the bridge.
func (c *Cluster) removeNetwork() error {
	ports, err := run("ip", "-o", "link", "show", "master", settings.Bridge)
	if err == nil { // else there is no bridge
		for _, line := range strings.Split(strings.TrimSpace(ports), "\n") {
			if fields := strings.Fields(line); len(fields) > 1 {
				name, _, _ := strings.Cut(strings.TrimSuffix(fields[1], ":"), "@")
				// It may be gone by itself: its network namespace has just ended.
				_, _ = run("ip", "link", "delete", name)
			}
		}
		if _, err := run("ip", "link", "delete", settings.Bridge); err != nil {
			return err
		}
	}
	ours, proxies, err := tables()
	if err != nil || !ours {
		// Without our table the proxy's are another cluster's.
		return err
	}
	for _, table := range append(proxies, "inet "+settings.Network) { // ours last: it marks the others
		if err := nft("delete table " + table); err != nil {
			return err
		}
	}
	return nil
}

// tables says whether our firewall table is there, and which of kube-proxy's are.
func tables() (ours bool, proxies []string, err error) {
	list, err := run("nft", "list", "tables")
	for _, line := range strings.Split(list, "\n") {
		switch table := strings.TrimPrefix(line, "table "); table {
		case "inet " + settings.Network:
			ours = true
		case "ip kube-proxy", "ip6 kube-proxy":
			proxies = append(proxies, table)
		}
	}
	return ours, proxies, err
}

func nft(script string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
