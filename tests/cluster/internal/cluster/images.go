package cluster

import (
	"fmt"
	"net/url"
	"os"
	"strings"

	"stoker.dev/cluster/internal/archive"
)

// LoadImage imports a docker-archive file, unless the cluster holds the same
// image under the same name already.
func (c *Cluster) LoadImage(path string) error {
	if err := c.mustRun(); err != nil {
		return err
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	names, id, err := archive.Identify(file)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	// containerd keeps another digest than the archive names, so the archive's
	// is noted here, in a folder that comes and goes with containerd's images.
	note := c.Data("images/" + url.PathEscape(names[0]))
	if known, err := os.ReadFile(note); err == nil && string(known) == id && c.hasImage(names[0]) {
		fmt.Printf("%s is loaded already\n", names[0])
		return nil
	}
	return c.step("loaded "+names[0], "containerd", "check that the file is whole: `tar tf "+path+"`", func() error {
		if _, err := c.ctr("images", "import", path); err != nil {
			return err
		}
		return os.WriteFile(note, []byte(id), 0o644)
	})
}

func (c *Cluster) hasImage(name string) bool {
	list, err := c.ctr("images", "list", "-q")
	if err != nil {
		return false
	}
	for _, line := range strings.Fields(list) {
		// containerd puts the name of a default registry in front.
		if line == name || strings.HasSuffix(line, "/"+name) {
			return true
		}
	}
	return false
}
