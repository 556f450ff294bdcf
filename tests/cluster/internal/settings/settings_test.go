package settings

import "testing"

func TestDefaultsNeedNoEnvironment(t *testing.T) {
	s, err := FromEnvironment()
	if err != nil || s.State != "/var/lib/stoker-cluster" || s.Run != "/run/stoker-cluster" || s.GPUs != 4 {
		t.Fatalf("got %+v, %v", s, err)
	}
}

func TestFoldersThatDownMustNotRemoveAreRefused(t *testing.T) {
	for _, dir := range []string{"/", "/var", "relative/folder", "/var/../etc"} {
		t.Setenv("STOKER_CLUSTER_STATE", dir)
		if _, err := FromEnvironment(); err == nil {
			t.Errorf("%q was accepted", dir)
		}
	}
}

func TestGPUsMustBeANumber(t *testing.T) {
	t.Setenv("STOKER_CLUSTER_GPUS", "many")
	if _, err := FromEnvironment(); err == nil {
		t.Fatal("accepted")
	}
}
