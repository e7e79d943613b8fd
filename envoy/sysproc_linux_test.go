package envoy

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Envoy does not outlive this process, even if it is killed.
func TestParentKilled(t *testing.T) {
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), parentEnv+"="+binary(t), "TMPDIR="+t.TempDir())
	parent.SysProcAttr = sysProcAttr()
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	addr := strings.TrimSpace(line)
	if err != nil || !takes(addr) {
		t.Errorf("Envoy did not start: %q, %v", line, err)
	}
	_ = parent.Process.Kill()
	_ = parent.Wait()
	until(t, "end of Envoy", func() bool { return !takes(addr) })
}
