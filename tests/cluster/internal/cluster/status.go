package cluster

import (
	"fmt"

	"stoker.dev/cluster/internal/process"
	"stoker.dev/cluster/internal/settings"
)

// Status prints what runs. Its error says why the cluster is not of use.
func (c *Cluster) Status() error {
	recorded := process.Recorded(c.Pids())
	for _, name := range daemons {
		id, ok := recorded[name]
		switch {
		case !ok:
			fmt.Printf("%-24s not started\n", name)
		case id.Alive():
			fmt.Printf("%-24s runs, pid %d\n", name, id.Pid)
		default:
			fmt.Printf("%-24s has ended, log %s\n", name, c.Log(name))
		}
	}
	if err := c.mustRun(); err != nil {
		return err
	}
	n, err := c.node()
	if err != nil {
		return err
	}
	fmt.Printf("%-24s Ready, %s %s\n", "node "+settings.Node, n.Status.Allocatable[settings.GPU], settings.GPU)
	fmt.Printf("%-24s %s\n", "models folder", c.Models())
	fmt.Println(c.Export())
	return nil
}
