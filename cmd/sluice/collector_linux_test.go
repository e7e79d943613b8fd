package main

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	commonv1 "go.opentelemetry.io/proto/otlp/common/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/sluiceproxy/sluice/k8s/testenv"
)

// otelcol is the version of OpenTelemetry's collector, and of its parts.
const otelcol = "v0.165.0"

// The parts of the collector: what takes OTLP, and what prints it.
const otelcolParts = `
dist: {name: otelcol, output_path: %q, module: example.com/otelcol}
receivers: [{gomod: go.opentelemetry.io/collector/receiver/otlpreceiver VERSION}]
exporters: [{gomod: go.opentelemetry.io/collector/exporter/debugexporter VERSION}]
`

const otelcolConfig = `
receivers: {otlp: {protocols: {grpc: {endpoint: %q}, http: {endpoint: %q}}}}
exporters: {debug: {verbosity: detailed}}
service:
  telemetry: {metrics: {level: none}}
  pipelines: {traces: {receivers: [otlp], exporters: [debug]}}
`

// builtCollector returns the path of OpenTelemetry's collector. Its builder
// builds it once into the user's cache.
func builtCollector(t *testing.T) string {
	t.Helper()
	builder := testenv.Program(t, "go.opentelemetry.io/collector/cmd/builder", otelcol)
	path := filepath.Join(filepath.Dir(builder), "otelcol")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	dir, err := os.MkdirTemp(filepath.Dir(builder), "build") // so that a file with this name is complete
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	parts := file(t, "parts.yaml", strings.ReplaceAll(fmt.Sprintf(otelcolParts, dir), "VERSION", otelcol))
	build := exec.CommandContext(t.Context(), builder, "--config", parts)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Rename(filepath.Join(dir, "otelcol"), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// startOTelCollector starts OpenTelemetry's collector, which prints the spans
// that it receives.
func startOTelCollector(t *testing.T) *collector {
	t.Helper()
	binary := builtCollector(t)
	c := &collector{grpc: fmt.Sprintf("127.0.0.1:%d", freePort(t)), http: fmt.Sprintf("127.0.0.1:%d", freePort(t))}
	cmd := exec.Command(binary, "--config", file(t, "otelcol.yaml", fmt.Sprintf(otelcolConfig, c.grpc, c.http)))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	printed, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder // read after it has ended
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.read(io.TeeReader(printed, &log))
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-done
		if err := cmd.Wait(); err != nil {
			t.Errorf("the collector: %v", err)
		}
		if strings.Contains(log.String(), "s3cr3t") {
			t.Error("a secret")
		}
		if t.Failed() {
			t.Log(log.String())
		}
	})
	for _, addr := range []string{c.grpc, c.http} {
		eventually(t, "the collector", func() bool {
			conn, err := net.Dial("tcp", addr)
			if err == nil {
				_ = conn.Close()
			}
			return err == nil
		})
	}
	return c
}

var (
	printedField     = regexp.MustCompile(`^ {4}(Trace ID|Parent ID|ID|Name) +: (.*)$`)
	printedAttribute = regexp.MustCompile(`^ {5}-> ([\w.]+): (Str|Int)\((.*)\)$`)
)

// read takes spans from what the collector's debug exporter prints.
func (c *collector) read(printed io.Reader) {
	var service string
	var last *tracev1.Span // nil between spans
	var batch []span       // is whole when the line that tells which part printed it comes
	lines := bufio.NewScanner(printed)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		field, attribute := printedField.FindStringSubmatch(line), printedAttribute.FindStringSubmatch(line)
		switch {
		case strings.HasPrefix(line, "ResourceSpans #"):
			last = nil
		case strings.HasPrefix(line, "Span #"):
			last = &tracev1.Span{}
			batch = append(batch, span{last, service})
		case field != nil && last != nil:
			id, _ := hex.DecodeString(field[2])
			switch field[1] {
			case "Trace ID":
				last.TraceId = id
			case "Parent ID":
				last.ParentSpanId = id
			case "ID":
				last.SpanId = id
			case "Name":
				last.Name = field[2]
			}
		case attribute != nil && last == nil:
			if attribute[1] == "service.name" {
				service = attribute[3]
			}
		case attribute != nil:
			value := &commonv1.AnyValue{Value: &commonv1.AnyValue_StringValue{StringValue: attribute[3]}}
			if n, err := strconv.ParseInt(attribute[3], 10, 64); err == nil && attribute[2] == "Int" {
				value.Value = &commonv1.AnyValue_IntValue{IntValue: n}
			}
			last.Attributes = append(last.Attributes, &commonv1.KeyValue{Key: attribute[1], Value: value})
		case strings.Contains(line, `"otelcol.component.id": "debug"`) && strings.HasPrefix(line, "\t{"):
			c.mu.Lock()
			c.spans = append(c.spans, batch...)
			c.mu.Unlock()
			last, batch = nil, nil
		}
	}
	_, _ = io.Copy(io.Discard, printed)
}

// TestCollector is TestTraces with OpenTelemetry's own collector.
func TestCollector(t *testing.T) {
	if os.Getenv("SLUICE_LONG") == "" {
		t.Skip("builds OpenTelemetry's collector, which takes minutes: SLUICE_LONG=1")
	}
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(protocol, func(t *testing.T) { seeTraces(t, startOTelCollector(t), protocol) })
	}
}
