package main

import (
	"strings"
	"testing"
)

// TestUsageMends checks that a wrong command line is answered with what to write
// instead, and status 2.
func TestUsageMends(t *testing.T) {
	config := file(t, "sluice.yaml", perClient)
	for args, want := range map[string]string{
		"run " + config:                     `unexpected argument "` + config + `"; write --config ` + config,
		"explain other.yaml":                `unexpected argument "other.yaml"; write --config other.yaml`,
		"run --config -":                    "--config -: want the name of a file; write /dev/stdin for stdin",
		"run -c sluice.yaml":                "unknown shorthand flag: 'c' in -c; write --config FILE",
		"--config sluice.yaml":              "unknown flag: --config; flags follow the command, as in sluice run --config FILE",
		"validate":                          "missing file; want the config files to validate, such as sluice.yaml, or - for stdin",
		"validate --config sluice.yaml":     "unknown flag: --config; the files are arguments, as in sluice validate sluice.yaml",
		"validate -c sluice.yaml":           "unknown shorthand flag: 'c' in -c; the files are arguments, as in sluice validate sluice.yaml",
		"validate --strict=maybe a":         `--strict "maybe": want true or false`,
		"explain":                           "--config: missing; want the file with the limits, or set SLUICE_CONFIG",
		"explain --path /a":                 "--config: missing; want the file with the limits, or set SLUICE_CONFIG",
		"doctor":                            "--config: missing; want the file with the limits, or set SLUICE_CONFIG",
		"bucket get --limit a":              "--config: missing; want the file with the limits, or set SLUICE_CONFIG",
		"doctor --envoy-timeout 5 --config": "--envoy-timeout \"5\": want a duration such as 500ms or 10s",
		"demo --port 99999":                 `--port "99999": want a port from 1 to 65535`,
		"demo --port eighty":                `--port "eighty": want a port from 1 to 65535`,
		"validat a":                         `unknown command "validat" for "sluice"; did you mean validate?`,
		"check a":                           `unknown command "check" for "sluice"; did you mean validate?`,
		"schema x":                          `unexpected argument "x"; sluice schema takes only flags`,
		"inject pod.yaml":                   `unexpected argument "pod.yaml"; write --file pod.yaml`,
		"inject --run-as-user root":         `--run-as-user "root": must be a user ID from 1 to 2147483647, or platform`,
		"envoy plane": `unknown configuration "plane"; want one of envoy-gateway, istio, istio-gateway, ` +
			`istio-waypoint, plain`,
		"envoy plain istio":       `unexpected argument "istio"; want one configuration`,
		"envoy istio sluice.yaml": `unexpected argument "sluice.yaml"; write --config sluice.yaml`,
		"backtest a.log":          "--config: missing; want the file with the limits, or set SLUICE_CONFIG",
		"serve":                   `unknown command "serve" for "sluice"; did you mean run?`,
		"get a":                   `unknown command "get" for "sluice"; did you mean bucket get?`,
		"frobnicate":              `unknown command "frobnicate" for "sluice"`,
	} {
		status, stdout, stderr := sluice(t, nil, strings.Fields(args)...)
		line, rest, _ := strings.Cut(stderr, "\n")
		if status != 2 || stdout != "" || line != "sluice: "+want || !strings.HasPrefix(rest, "See 'sluice") {
			t.Errorf("sluice %s: status %d\n%s%s\nwant %s", args, status, stdout, stderr, want)
		}
	}
}

// TestHelpShowsNoStandIns checks that no help shows what stands for a value that is
// left out, or a duration with units that are zero.
func TestHelpShowsNoStandIns(t *testing.T) {
	for args, want := range map[string]string{
		"bucket get": "--absent=ADDRESS ", "webhook": "(default 1m)", "doctor": "(default 200ms)",
		"validate": "(default 200ms)",
	} {
		_, stdout, _ := sluice(t, nil, append(strings.Fields(args), "--help")...)
		if !strings.Contains(stdout, want) || strings.Contains(stdout, `="-"`) || strings.Contains(stdout, "m0s") {
			t.Errorf("sluice %s --help has no %q, or a stand-in:\n%s", args, want, stdout)
		}
	}
}
