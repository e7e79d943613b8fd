package envoy

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

// Release is a minor release of Envoy, such as 1.40. The zero value stands for
// the release of Version.
type Release struct{ Major, Minor int }

var (
	// oldest is the oldest release whose configuration is printed.
	oldest = Release{1, 36}
	// clusterRetries is the first release that takes a retry_policy in a
	// cluster's HttpProtocolOptions.
	clusterRetries = Release{1, 37}
)

// String returns MAJOR.MINOR.
func (r Release) String() string { return fmt.Sprintf("%d.%d", r.Major, r.Minor) }

// before reports whether r is older than other.
func (r Release) before(other Release) bool {
	return r.Major < other.Major || r.Major == other.Major && r.Minor < other.Minor
}

var (
	releasePattern = regexp.MustCompile(`^([0-9]{1,4})\.([0-9]{1,4})(\.[0-9]{1,4})?$`)
	// versionPattern matches what `envoy --version` prints: commit, version,
	// and how it was built. Builds of others have a suffix, such as -dev.
	versionPattern = regexp.MustCompile(`version: [^/\s]*/(([0-9]{1,4}\.[0-9]{1,4})\.[0-9]{1,4}[^/\s]*)/`)
)

// ParseRelease parses a release, such as 1.36, or a version of one, such as
// 1.36.4. It returns an error if the release is older than 1.36, for which
// nothing is printed.
func ParseRelease(text string) (Release, error) {
	match := releasePattern.FindStringSubmatch(text)
	if match == nil {
		return Release{}, fmt.Errorf("must be MAJOR.MINOR, such as %v", oldest)
	}
	major, _ := strconv.Atoi(match[1]) // the pattern has digits only
	minor, _ := strconv.Atoi(match[2])
	r := Release{major, minor}
	if r.before(oldest) {
		return Release{}, fmt.Errorf("must be %v or newer", oldest)
	}
	return r, nil
}

// ReleaseOf returns the release of an Envoy binary, which it runs to ask. It
// returns an error if the binary does not name a version, or if that is older
// than 1.36.
func ReleaseOf(ctx context.Context, binary string) (Release, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return Release{}, fmt.Errorf("%s --version: %w; %s", binary, err, otherEnvoy)
	}
	match := versionPattern.FindSubmatch(out)
	if match == nil {
		return Release{}, fmt.Errorf("%s --version names no version of Envoy: %.100q; %s",
			binary, strings.TrimSpace(string(out)), otherEnvoy)
	}
	r, err := ParseRelease(string(match[2]))
	if err != nil {
		return Release{}, fmt.Errorf("%s is Envoy %s, which %w; %s", binary, match[1], err, otherEnvoy)
	}
	return r, nil
}

// otherEnvoy says what to do about an Envoy on PATH that cannot be used.
const otherEnvoy = "upgrade it, or take it off PATH to have Envoy " + Version + " installed"
