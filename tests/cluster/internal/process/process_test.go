package process

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestStatWithBracketsAndSpacesInTheName(t *testing.T) {
	line := "42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 1\n"
	state, start, err := parseStat(line)
	if err != nil || state != "S" || start != "987654" {
		t.Fatalf("got %q %q %v", state, start, err)
	}
	if _, _, err := parseStat("42 (cut"); err == nil {
		t.Fatal("a line cut short is accepted")
	}
}

func TestAReusedPidIsAnotherProcess(t *testing.T) {
	me, err := Of(os.Getpid())
	if err != nil || !me.Alive() {
		t.Fatalf("%+v is not alive: %v", me, err)
	}
	earlier := me
	earlier.StartTime = "1"
	otherBoot := me
	otherBoot.Boot = "another"
	for _, id := range []Identity{earlier, otherBoot} {
		if id.Alive() {
			t.Errorf("%+v is taken for this process", id)
		}
		if err := id.Kill(time.Second); err != nil {
			t.Errorf("ending a process that is gone: %v", err)
		}
	}
}

func TestADaemonIsRecordedRecognisedAndEnded(t *testing.T) {
	dir := t.TempDir()
	id, err := Daemon{Path: "/bin/sleep", Name: "sleep", Args: []string{"60"}, Log: filepath.Join(dir, "log"), Dir: dir}.Start()
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Save(dir, "sleeper"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "torn.json"), []byte(`{"pid":`), 0o644); err != nil {
		t.Fatal(err)
	}
	found := Recorded(dir)
	if len(found) != 1 || found["sleeper"] != id || !id.Alive() {
		t.Fatalf("recorded %v, started %v", found, id)
	}
	if err := id.Kill(5 * time.Second); err != nil || id.Alive() {
		t.Fatalf("still there: %v", err)
	}
}
