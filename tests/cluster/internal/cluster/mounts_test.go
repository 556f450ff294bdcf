package cluster

import (
	"slices"
	"testing"
)

func TestMountPointsWithSpacesAndOptionalFields(t *testing.T) {
	got := parseMounts(`22 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw
40 22 0:30 / /var/lib/a\040b rw - tmpfs tmpfs rw
41 22 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
`)
	want := []mount{{"/", "ext4"}, {"/var/lib/a b", "tmpfs"}, {"/sys/fs/cgroup/cpu", "cgroup"}}
	if !slices.Equal(got, want) {
		t.Fatalf("got %v", got)
	}
}
