package cluster

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

type progress struct{ since time.Time }

// step does one thing and says how it went. When it fails, the error says what
// failed, what its log ends with and where it is, and what to do.
func (c *Cluster) step(what, log, advice string, do func() error) error {
	if c.progress.since.IsZero() {
		c.progress.since = time.Now()
	}
	err := do()
	seconds := time.Since(c.progress.since).Seconds()
	if err == nil {
		fmt.Printf("%6.1f s  %s\n", seconds, what)
		return nil
	}
	fmt.Printf("%6.1f s  FAILED: %s\n", seconds, what)
	text := fmt.Sprintf("%s: %v", what, err)
	if log != "" {
		text += fmt.Sprintf("\nits log, %s, ends with:\n%s", c.Log(log), tail(c.Log(log), 8))
	}
	return errors.New(text + "\nwhat to do: " + advice)
}

// await asks again until the check passes, its time is up, or the daemon that
// it waits for has ended.
func (c *Cluster) await(daemon string, limit time.Duration, check func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return nil
		}
		if daemon != "" && !c.alive(daemon) {
			return fmt.Errorf("%s has ended (%w)", daemon, err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s: %w", limit, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func tail(path string, lines int) string {
	text, err := os.ReadFile(path)
	if err != nil || len(text) == 0 {
		return "    (nothing)"
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return "    " + strings.Join(all[max(0, len(all)-lines):], "\n    ")
}
