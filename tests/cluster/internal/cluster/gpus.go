package cluster

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"stoker.dev/cluster/internal/settings"
)

// GPUs makes the node advertise n GPUs that don't exist: the scheduler counts
// them as it counts real ones. The kubelet leaves resources that it doesn't
// manage in the node's status as they are, over restarts too.
func (c *Cluster) GPUs(n int) error {
	if err := c.mustRun(); err != nil {
		return err
	}
	return c.step(fmt.Sprintf("node advertises %d %s", n, settings.GPU), "kubelet",
		"run `local-cluster gpus N` again; if it fails again, `local-cluster down` and `up`",
		func() error { return c.setGPUs(n) })
}

func (c *Cluster) setGPUs(n int) error {
	patch, err := json.Marshal([]map[string]string{
		gpuPatch("capacity", n),
		gpuPatch("allocatable", n),
	})
	if err != nil {
		return err
	}
	return c.await("kubelet", 15*time.Second, func() error {
		var now node
		if err := c.ask(http.MethodPatch, nodePath+"/status", "application/json-patch+json", patch, &now); err != nil {
			return err
		}
		if got := now.Status.Allocatable[settings.GPU]; got != strconv.Itoa(n) {
			return fmt.Errorf("the node says %q", got)
		}
		return nil
	})
}

func gpuPatch(list string, n int) map[string]string {
	name := strings.ReplaceAll(settings.GPU, "/", "~1") // as a JSON pointer has it
	return map[string]string{"op": "add", "path": "/status/" + list + "/" + name, "value": strconv.Itoa(n)}
}
