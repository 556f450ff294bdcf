package cluster

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
)

type mount struct{ point, kind string }

// mounts lists what this machine has mounted, in the order of mounting.
func mounts() []mount {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	return parseMounts(string(text))
}

func parseMounts(text string) (found []mount) {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for _, line := range strings.Split(text, "\n") {
		// Optional fields stand before a lone dash, so the kind is counted from it.
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if ok && len(left) >= 5 && len(right) >= 1 {
			found = append(found, mount{unescape.Replace(left[4]), right[0]})
		}
	}
	return found
}

// unmountAll unmounts everything below the cluster's folders, the latest first.
func (c *Cluster) unmountAll() error {
	all := mounts()
	slices.Reverse(all)
	for _, m := range all {
		if !strings.HasPrefix(m.point, c.State+"/") && !strings.HasPrefix(m.point, c.Run+"/") {
			continue
		}
		if err := syscall.Unmount(m.point, syscall.MNT_DETACH); err != nil && err != syscall.EINVAL {
			return fmt.Errorf("unmounting %s: %w", m.point, err)
		}
	}
	return nil
}
