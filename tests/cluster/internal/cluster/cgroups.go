package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"stoker.dev/cluster/internal/settings"
)

// makeCgroups makes the cgroup below which the kubelet keeps its pods, in every
// hierarchy of a version 1 machine or in the one of version 2.
func makeCgroups() error {
	for _, top := range cgroupMounts() {
		dir := filepath.Join(top, settings.Cgroup)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		// A new cpuset of version 1 is empty, and nothing can run in it.
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
			own, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || strings.TrimSpace(string(own)) != "" {
				continue
			}
			above, err := os.ReadFile(filepath.Join(top, name))
			if err != nil {
				continue // version 2: empty means all
			}
			if err := os.WriteFile(filepath.Join(dir, name), above, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeCgroups ends every process of every pod and removes the cgroups.
func removeCgroups() error {
	deadline := time.Now().Add(15 * time.Second)
	for {
		left, err := sweepCgroups()
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s can't be removed: %w", left[0], err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func sweepCgroups() (left []string, err error) {
	for _, top := range cgroupMounts() {
		var dirs []string
		_ = filepath.WalkDir(filepath.Join(top, settings.Cgroup), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		slices.Reverse(dirs) // a walk lists parents first; they go last
		for _, dir := range dirs {
			procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			for _, pid := range strings.Fields(string(procs)) {
				if n, err := strconv.Atoi(pid); err == nil && n > 1 {
					_ = syscall.Kill(n, syscall.SIGKILL)
				}
			}
			if e := os.Remove(dir); e != nil && !errors.Is(e, fs.ErrNotExist) {
				left, err = append(left, dir), e
			}
		}
	}
	return left, err
}

func cgroupMounts() (tops []string) {
	for _, m := range mounts() {
		if m.kind == "cgroup" || m.kind == "cgroup2" {
			tops = append(tops, m.point)
		}
	}
	return tops
}
