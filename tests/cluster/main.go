// Local-cluster is a Kubernetes cluster for tests in one program: called by the
// name of a component it is that component, else it starts and stops them.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"stoker.dev/cluster/internal/archive"
	"stoker.dev/cluster/internal/cluster"
	"stoker.dev/cluster/internal/settings"
)

const usage = `usage: local-cluster COMMAND
  up                         start the cluster, clearing what a killed one left
  down                       remove every trace of it
  status                     say what runs; fails unless all does
  env                        print the line that points a shell at it
  kubeconfig                 print the path of its kubeconfig
  load-image FILE            import a docker-archive file
  pack-image NAME:TAG PROGRAM FILE
                             write a docker-archive file with one static program
  gpus N                     have the node advertise N GPUs
Environment: STOKER_CLUSTER_STATE, STOKER_CLUSTER_RUN (folders), STOKER_CLUSTER_GPUS (4).
Called as kubectl, helm, etcd, kubelet, ... it is that program.`

func main() {
	if run, ok := components[filepath.Base(os.Args[0])]; ok {
		run()
		return
	}
	if err := localCluster(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "local-cluster:", err)
		os.Exit(1)
	}
}

func localCluster(args []string) error {
	s, err := settings.FromEnvironment()
	if err != nil {
		return err
	}
	command := append(args, "")[0]
	arguments := map[string]int{
		"up": 0, "down": 0, "status": 0, "env": 0, "kubeconfig": 0, "load-image": 1, "gpus": 1, "pack-image": 3,
	}
	if wanted, known := arguments[command]; !known || len(args)-1 != wanted {
		return fmt.Errorf("can't do %q\n%s", args, usage)
	}
	// What changes nothing needs no lock.
	switch command {
	case "env":
		fmt.Println(s.Export())
		return nil
	case "kubeconfig":
		fmt.Println(s.Kubeconfig())
		return nil
	case "pack-image":
		return packImage(args[1], args[2], args[3])
	case "status":
		c, err := cluster.Look(s)
		if err != nil {
			return err
		}
		return c.Status()
	}
	c, err := cluster.Open(s)
	if err != nil {
		return err
	}
	switch command {
	case "up":
		return c.Up()
	case "down":
		return c.Down()
	case "load-image":
		return c.LoadImage(args[1])
	default:
		n, err := strconv.Atoi(args[1])
		if err != nil || n < 0 {
			return fmt.Errorf("%q is no number of GPUs", args[1])
		}
		return c.GPUs(n)
	}
}

func packImage(name, program, file string) error {
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	if err := (archive.Image{Name: name, Program: program}).Write(out); err != nil {
		return err
	}
	return out.Close()
}
