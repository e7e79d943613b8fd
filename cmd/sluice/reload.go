package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/sluiceproxy/sluice/limiter/policy"
)

// configSource reads a config.
type configSource struct {
	file string // its name in errors
	load func() (*policy.Config, policy.Inputs, error)
	// reload reads the config again. before are the inputs of the last reading.
	reload func(before policy.Inputs) (*policy.Config, policy.Inputs, error)
}

// configFile returns the source that reads file, or no file if it is empty.
func (p *program) configFile(file string, settings []policy.Setting) configSource {
	return configSource{
		file: file,
		load: func() (*policy.Config, policy.Inputs, error) { return policy.Load(file, p.getenv, settings...) },
		reload: func(before policy.Inputs) (*policy.Config, policy.Inputs, error) {
			return policy.Reload(file, before, p.getenv, settings...)
		},
	}
}

// loadStable reads a config for the first time, when its files are not known
// yet. It reads until two consecutive readings are equal, so that it does not
// return a mixture of two versions.
func (c configSource) loadStable() (*policy.Config, policy.Inputs, error) {
	cfg, inputs, err := c.load()
	for range 5 {
		before := inputs
		if cfg, inputs, err = c.reload(before); inputs.Hash == before.Hash {
			break
		}
	}
	return cfg, inputs, err
}

const (
	// debounce is how long the files must be unchanged before they are read,
	// because editors and copies write in steps.
	debounce = 50 * time.Millisecond
	// maxDebounce is how long changes can delay the reading.
	maxDebounce = time.Second
	// pollEvery is how often the files are checked without an event, because
	// not every file system sends events.
	pollEvery = 10 * time.Second
)

// reloader reloads the config of a running sidecar when its files change. A
// config with an error is rejected as a whole. Only last is safe for concurrent
// use.
type reloader struct {
	source configSource
	apply  func(*policy.Config) error // fails if the change needs a restart
	config *policy.Config             // in force
	log    *zap.Logger

	inputs policy.Inputs // of the last attempt, whether it succeeded or not
	state  string        // stateOf the files at the last attempt
	// watched are the directories that are watched. names are the paths in them
	// whose events matter; dir/* stands for all paths in dir.
	watched, names map[string]bool

	last    atomic.Pointer[reloadResult] // nil: there was no attempt
	reloads *prometheus.CounterVec
	info    *prometheus.GaugeVec
	domain  *prometheus.GaugeVec
	limits  *prometheus.GaugeVec
}

// reloadResult is the result of an attempt to reload the config.
type reloadResult struct {
	at     time.Time
	errors []string // empty if the new config is in force
}

// newReloader returns a reloader for a sidecar that runs with cfg, which was
// read from inputs.
func newReloader(
	source configSource, cfg *policy.Config, inputs policy.Inputs, apply func(*policy.Config) error,
	log *zap.Logger, metrics prometheus.Registerer,
) *reloader {
	r := &reloader{
		source: source,
		apply:  apply,
		config: cfg,
		log:    log,
		inputs: inputs,
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_config_reloads_total", Help: "Total number of config reloads, by result.",
		}, []string{"result"}),
		info: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "sluice_config_info", Help: "Always 1, with the hash of the config in force.",
		}, []string{"hash"}),
		domain: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "sluice_domain_info", Help: "Always 1, with the domain of the config in force.",
		}, []string{"domain"}),
		limits: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "sluice_config_limits", Help: "Number of limits of the config in force, by mode.",
		}, []string{"mode"}),
	}
	r.reloads.WithLabelValues("success")
	r.reloads.WithLabelValues("failure")
	metrics.MustRegister(r.reloads, r.info, r.domain, r.limits)
	r.show(cfg)
	return r
}

// run reloads the config when its files change, and when hangup receives a
// signal, until ctx ends.
func (r *reloader) run(ctx context.Context, hangup <-chan os.Signal) {
	if r.inputs.Piped {
		r.log.Warn("config was read from a pipe and cannot be reloaded, except for the files that it names",
			zap.String("config", r.source.file))
	}
	var events chan fsnotify.Event
	var watchErrors chan error
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		r.log.Warn("config files cannot be watched, polling them", zap.Duration("every", pollEvery), zap.Error(err))
	} else {
		defer func() { _ = watcher.Close() }()
		events, watchErrors = watcher.Events, watcher.Errors
		r.watch(watcher)
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	quiet := time.NewTimer(debounce) // the files may have changed since they were read
	defer quiet.Stop()
	since := time.Now() // when changes that are not read yet began, or zero
	for {
		var done bool
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			done = r.reload(true)
		case <-tick.C:
			done = stateOf(r.inputs.Paths) == r.state
		case e := <-events:
			if !r.concerns(e.Name) {
				continue
			}
			r.state = "" // the file may have changed and kept its size and time
		case err := <-watchErrors: // events may be lost
			r.log.Warn("watching config files failed", zap.Error(err))
		case <-quiet.C:
			overdue := time.Since(since) >= maxDebounce
			done = (overdue || !writtenAfter(r.inputs.Paths, time.Now().Add(-debounce))) && r.reload(false)
			if !done && overdue {
				since = time.Now()
			}
		}
		// A change in a directory before it was watched sent no event, so the
		// files of new directories are read again.
		if done && watcher != nil && r.watch(watcher) {
			done = false
		}
		switch {
		case done:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
			quiet.Reset(debounce)
		case time.Since(since) < maxDebounce:
			quiet.Reset(debounce)
		default: // changes have delayed the reading long enough
			quiet.Reset(0)
		}
	}
}

// concerns reports whether a change of the file name may change the inputs.
func (r *reloader) concerns(name string) bool {
	return r.names[name] || r.names[filepath.Dir(name)+"/*"]
}

// reload reads the files if they have changed since the last attempt or force is
// true, and applies the config if it is valid. It returns false if the files
// changed while they were read, so that they must be read again.
func (r *reloader) reload(force bool) bool {
	before := stateOf(r.inputs.Paths)
	if before == r.state && !force {
		return true
	}
	cfg, inputs, err := r.source.reload(r.inputs)
	if !slices.Equal(inputs.Paths, r.inputs.Paths) { // other files are read now
		before = stateOf(inputs.Paths)
		cfg, inputs, err = r.source.reload(inputs)
	}
	after := stateOf(inputs.Paths)
	same := inputs.Hash == r.inputs.Hash
	r.inputs, r.state = inputs, after
	if after != before {
		r.inputs.Hash, r.state = [len(inputs.Hash)]byte{}, ""
		return false
	}
	if same && !force {
		return true
	}
	if err == nil {
		err = r.apply(cfg)
	}
	if err != nil {
		messages := messagesOf(err)
		r.last.Store(&reloadResult{time.Now(), messages})
		r.reloads.WithLabelValues("failure").Inc()
		r.log.Error("config reload failed, keeping the previous config", zap.Strings("mistakes", messages))
		return true
	}
	r.last.Store(&reloadResult{at: time.Now()})
	r.reloads.WithLabelValues("success").Inc()
	r.log.Info("config reloaded", append(describeConfig(cfg), changed(cfg.Since(r.config))...)...)
	r.config = cfg
	r.show(cfg)
	return true
}

// show makes the metrics those of a config that came into force.
func (r *reloader) show(cfg *policy.Config) {
	r.info.Reset()
	r.info.WithLabelValues(cfg.Hash).Set(1)
	r.domain.Reset()
	r.domain.WithLabelValues(cfg.Domain).Set(1)
	enforced, shadow := countModes(cfg)
	r.limits.WithLabelValues("enforce").Set(float64(enforced))
	r.limits.WithLabelValues("shadow").Set(float64(shadow))
}

// countModes returns how many limits a config has in each mode.
func countModes(cfg *policy.Config) (enforced, shadow int) {
	for _, l := range cfg.Limits() {
		if l.Shadow {
			shadow++
		} else {
			enforced++
		}
	}
	return enforced, shadow
}

// describeConfig returns the log fields of a config that comes into force.
func describeConfig(cfg *policy.Config) []zap.Field {
	_, shadow := countModes(cfg)
	fields := []zap.Field{
		zap.String("hash", cfg.Hash), zap.String("mode", cfg.Mode()), zap.Int("limits", len(cfg.Limits())),
	}
	if shadow > 0 {
		fields = append(fields, zap.Int("shadow_limits", shadow))
	}
	if n := len(cfg.Warnings); n > 0 { // sluice validate says which
		fields = append(fields, zap.Int("warnings", n))
	}
	return fields
}

// changed returns the log fields of the changes to a config, with at most 20
// names of limits in each.
func changed(c policy.Changes) (fields []zap.Field) {
	const most = 20
	for _, list := range []struct {
		field string
		names []string
	}{{"added", c.Added}, {"removed", c.Removed}, {"changed", c.Changed}, {"settings", c.Settings}} {
		names := list.names
		if len(names) > most {
			names = append(slices.Clone(names[:most]), fmt.Sprintf("and %d more", len(names)-most))
		}
		if len(names) > 0 {
			fields = append(fields, zap.Strings(list.field, names))
		}
	}
	return fields
}

// messagesOf returns the errors of a config, at most 20 of them, or err itself.
func messagesOf(err error) []string {
	var mistakes policy.Mistakes
	if !errors.As(err, &mistakes) {
		return []string{err.Error()}
	}
	const most = 20
	lines := make([]string, 0, min(len(mistakes), most+1))
	for i, m := range mistakes {
		if i == most {
			lines = append(lines, fmt.Sprintf("and %d more", len(mistakes)-most))
			break
		}
		lines = append(lines, m.String())
	}
	return lines
}

// stateOf returns a text that changes when a file does: the targets of symbolic
// links, the sizes and the modification times.
func stateOf(paths []string) string {
	var b strings.Builder
	for _, path := range paths {
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			fmt.Fprintf(&b, "%s: %v\n", path, err)
			continue
		}
		if info, err := os.Stat(target); err != nil {
			fmt.Fprintf(&b, "%s: %v\n", path, err)
		} else {
			fmt.Fprintf(&b, "%s %d %d\n", target, info.Size(), info.ModTime().UnixNano())
		}
	}
	return b.String()
}

// writtenAfter reports whether a file was written between instant and now, by
// the file system's clock.
func writtenAfter(paths []string, instant time.Time) bool {
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil || info.IsDir() {
			continue
		}
		if info.ModTime().After(instant) && info.ModTime().Before(time.Now()) {
			return true
		}
	}
	return false
}

// watch makes w watch the directories in which a change may change the inputs.
// It reports whether there are new ones.
func (r *reloader) watch(w *fsnotify.Watcher) (added bool) {
	wanted := make(map[string]bool)
	r.names = make(map[string]bool)
	for _, path := range r.inputs.Paths {
		if path, err := filepath.Abs(path); err == nil {
			addWatched(wanted, r.names, path, maxLinks)
		}
	}
	for dir := range r.watched {
		if !wanted[dir] {
			_ = w.Remove(dir) // fails if dir is gone
		}
	}
	for dir := range wanted {
		if err := w.Add(dir); err != nil { // also known ones: they may have been replaced
			r.log.Debug("directory cannot be watched", zap.String("directory", dir), zap.Error(err))
			delete(wanted, dir)
		} else if !r.watched[dir] {
			added = true
		}
	}
	r.watched = wanted
	return added
}

// maxLinks is the number of symbolic links of a path that are followed, as in
// Linux.
const maxLinks = 40

// addWatched adds the directories that must be watched to see every change of an
// absolute path, and the names in them whose events matter: the file, the
// missing parts of its directory, and each symbolic link on the way with its
// target, as in a volume of Kubernetes.
func addWatched(dirs, names map[string]bool, path string, links int) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		dirs[path], names[path+"/*"] = true, true
	}
	names[path] = true
	dir := filepath.Dir(path)
	for !exists(dir) && dir != filepath.Dir(dir) {
		names[dir] = true // it may be created
		dir = filepath.Dir(dir)
	}
	dirs[dir] = true
	for p := path; p != filepath.Dir(p) && links > 0; p = filepath.Dir(p) {
		target, err := os.Readlink(p)
		if err != nil {
			continue // not a link
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(p), target)
		}
		dirs[filepath.Dir(p)], names[p] = true, true
		links--
		addWatched(dirs, names, filepath.Join(target, strings.TrimPrefix(path, p)), links)
	}
}

// exists reports whether there is a file or a directory at path.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
