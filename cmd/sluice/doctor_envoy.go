package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/sluiceproxy/sluice/cmd/sluice/doctor"
	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// envoyFlags say which Envoy's config doctor looks at.
type envoyFlags struct {
	admin string // URL of its admin interface
	file  string // with its config; - is stdin
}

func (f *envoyFlags) given() bool { return f.admin != "" || f.file != "" }

// check returns an error if the flags are wrong.
func (f *envoyFlags) check() error {
	if f.admin != "" && f.file != "" {
		return usageError{errors.New("--envoy-admin and --envoy-config are mutually exclusive")}
	}
	if f.admin != "" {
		if _, err := doctor.NewAdmin(f.admin); err != nil {
			return usageError{fmt.Errorf("--envoy-admin: %w", err)} // without the URL, which may have a password
		}
	}
	return nil
}

// addEnvoy adds what is found about an Envoy. cfg is sluice's config, or nil. An
// admin interface that does not answer is a finding, and a file that cannot be
// read an error.
func (d *diagnosis) addEnvoy(ctx context.Context, of *envoyFlags, stdin io.Reader, cfg *policy.Config) error {
	var e *doctor.Envoy
	if of.file != "" {
		text, err := readBounded(of.file, stdin, doctor.MaxConfig)
		if err == nil {
			e, err = doctor.Parse(text)
		}
		if err != nil {
			return fmt.Errorf("--envoy-config %s: %w", of.file, err)
		}
	} else {
		admin, err := doctor.NewAdmin(of.admin)
		if err != nil {
			return fmt.Errorf("--envoy-admin: %w", err)
		}
		if e, err = admin.Read(ctx); err != nil {
			d.add(limiter.Finding{Name: "envoy", Status: limiter.Fail, Detail: fmt.Sprintf("%v: %v", admin, err),
				Fix: "see that Envoy runs, and that its bootstrap has admin at this address"})
			return nil
		}
	}
	for _, f := range doctor.Diagnose(e, cfg) {
		d.add(f)
	}
	return nil
}

// readBounded reads a file of at most so many bytes. - is stdin.
func readBounded(name string, stdin io.Reader, most int64) ([]byte, error) {
	from := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, errors.Unwrap(err) // the caller names the file
		}
		defer func() { _ = f.Close() }()
		from = f
	}
	text, err := io.ReadAll(io.LimitReader(from, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("more than %d MiB", most>>20)
	}
	return text, err
}
