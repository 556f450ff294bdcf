// Package process starts daemons that outlive the command that started them,
// and recognises them later. A pid alone says little: it is reused. With the
// start time and the boot it names one process for good.
package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Identity names one process.
type Identity struct {
	Pid       int    `json:"pid"`
	StartTime string `json:"startTime"` // field 22 of /proc/PID/stat: ticks since boot
	Boot      string `json:"boot"`
}

// Daemon is a program to run in the background.
type Daemon struct {
	Path string // the file to execute
	Name string // argv[0]
	Args []string
	Log  string
	Dir  string
}

// Start runs the daemon in a session of its own and says which process it is.
func (d Daemon) Start() (Identity, error) {
	log, err := os.OpenFile(d.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return Identity{}, err
	}
	defer log.Close()
	cmd := exec.Cmd{
		Path: d.Path, Args: append([]string{d.Name}, d.Args...), Dir: d.Dir,
		Env:    []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + d.Dir},
		Stdout: log, Stderr: log,
		// Its own session: a hang-up or Ctrl-C of the caller doesn't reach it.
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		return Identity{}, err
	}
	id, err := Of(cmd.Process.Pid)
	// Reap it if it ends while this command still runs, or it stays a zombie
	// that looks alive.
	go func() { _ = cmd.Wait() }()
	return id, err
}

// Of reads the identity of a running process.
func Of(pid int) (Identity, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Identity{}, err
	}
	_, start, err := parseStat(string(stat))
	if err != nil {
		return Identity{}, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return Identity{pid, start, strings.TrimSpace(string(boot))}, err
}

// Alive says whether this very process still runs. A zombie doesn't: it waits
// for its parent to notice that it ended.
func (id Identity) Alive() bool {
	now, err := Of(id.Pid)
	if err != nil || now != id {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", id.Pid))
	if err != nil {
		return false
	}
	state, _, err := parseStat(string(stat))
	return err == nil && state != "Z" && state != "X"
}

// parseStat returns the state and start time in a line of /proc/PID/stat. The
// second field is a name in brackets that may hold spaces and brackets itself,
// so the fields are counted from its last bracket.
func parseStat(line string) (state, start string, err error) {
	end := strings.LastIndexByte(line, ')')
	if end < 0 {
		return "", "", fmt.Errorf("no process name in %q", line)
	}
	fields := strings.Fields(line[end+1:])
	if len(fields) < 20 {
		return "", "", fmt.Errorf("too few fields in %q", line)
	}
	return fields[0], fields[19], nil
}

// Kill ends the process and returns once it is gone.
func (id Identity) Kill(patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for id.Alive() {
		// The check just before the signal: never a stranger with the same pid.
		if err := syscall.Kill(id.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("ending process %d: %w", id.Pid, err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d still runs %s after SIGKILL", id.Pid, patience)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

// Save records the identity under a name.
func (id Identity) Save(dir, name string) error {
	text, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".json"), text, 0o644)
}

// Recorded returns the identities saved in a folder, by name. A record that
// can't be read (a write cut short) names no process and is left out.
func Recorded(dir string) map[string]Identity {
	found := map[string]Identity{}
	files, _ := filepath.Glob(filepath.Join(dir, "*.json"))
	for _, file := range files {
		var id Identity
		if text, err := os.ReadFile(file); err == nil && json.Unmarshal(text, &id) == nil && id.Pid > 1 {
			found[strings.TrimSuffix(filepath.Base(file), ".json")] = id
		}
	}
	return found
}
