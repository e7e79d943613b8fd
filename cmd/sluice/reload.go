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

// configSource is where a config comes from.
type configSource struct {
	file string // as mistakes name it
	// load reads it for the first time, and reload again.
	load   func() (*policy.Config, policy.Inputs, error)
	reload func(before policy.Inputs) (*policy.Config, policy.Inputs, error)
}

// configFile is the source of a file, empty for none.
func (p *program) configFile(file string, settings []policy.Setting) configSource {
	return configSource{
		file: file,
		load: func() (*policy.Config, policy.Inputs, error) { return policy.Load(file, p.getenv, settings...) },
		reload: func(before policy.Inputs) (*policy.Config, policy.Inputs, error) {
			return policy.Reload(file, before, p.getenv, settings...)
		},
	}
}

// loadWhole reads a config for the first time, when nobody knows yet which
// files there are. It reads until two readings in a row are equal, so that
// what it returns is no mixture of two versions.
func (c configSource) loadWhole() (*policy.Config, policy.Inputs, error) {
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
	// settle is how long the files must be left alone before they are read: editors and copies write in steps.
	settle = 50 * time.Millisecond
	// patience is how long changes may go on before the files are read all the same.
	patience = time.Second
	// recheck is how often the files are looked at although nobody said that they changed: not every file system says.
	recheck = 10 * time.Second
)

// reloader keeps a running sidecar by its files: a new config takes the place of the old one whole, or not at all.
type reloader struct {
	source configSource
	use    func(*policy.Config) error // refuses what cannot be changed while running
	log    *zap.Logger

	inputs policy.Inputs // of the last attempt, good or bad
	state  string        // of the files, as stat sees them, at the last attempt
	// watched are the directories that are watched, and names are what concerns the inputs in them; one that ends in /* is all of
	// a directory.
	watched, names map[string]bool

	last    atomic.Pointer[reloaded]
	reloads *prometheus.CounterVec
	info    *prometheus.GaugeVec
}

// reloaded is how an attempt at a new config ended.
type reloaded struct {
	at       time.Time
	mistakes []string // empty: it is in force
}

func newReloader(source configSource, cfg *policy.Config, inputs policy.Inputs, use func(*policy.Config) error, log *zap.Logger, metrics prometheus.Registerer) *reloader {
	r := &reloader{
		source: source,
		use:    use,
		log:    log,
		inputs: inputs,
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_config_reloads_total", Help: "New configs, by whether they are in force.",
		}, []string{"result"}),
		info: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "sluice_config_info", Help: "1, with the hash of the config that is in force.",
		}, []string{"hash"}),
	}
	r.reloads.WithLabelValues("success")
	r.reloads.WithLabelValues("failure")
	r.info.WithLabelValues(cfg.Hash).Set(1)
	metrics.MustRegister(r.reloads, r.info)
	return r
}

// run reloads when the files change, and when hangup says so, until ctx ends.
func (r *reloader) run(ctx context.Context, hangup <-chan os.Signal) {
	if r.inputs.Piped {
		r.log.Warn("the config was read from a pipe: it cannot be reloaded, only the files that it names can; a change takes a restart",
			zap.String("config", r.source.file))
	}
	var events chan fsnotify.Event
	var watchErrors chan error
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		r.log.Warn("the config's files are not watched, only looked at now and then", zap.Duration("every", recheck), zap.Error(err))
	} else {
		defer func() { _ = watcher.Close() }()
		events, watchErrors = watcher.Events, watcher.Errors
		r.watch(watcher)
	}
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	quiet := time.NewTimer(settle) // the files may have changed since they were read
	defer quiet.Stop()
	since := time.Now() // when the changes began that go on; zero: none do
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
			r.state = "" // whatever the file's size and time say
		case err := <-watchErrors: // some events may be lost
			r.log.Warn("watching the config's files", zap.Error(err))
		case <-quiet.C:
			overdue := time.Since(since) >= patience
			done = (overdue || !writtenAfter(r.inputs.Paths, time.Now().Add(-settle))) && r.reload(false)
			if !done && overdue {
				since = time.Now()
			}
		}
		// What changed before its directory was watched was seen by nobody, so that it is looked at again.
		if done && watcher != nil && r.watch(watcher) {
			done = false
		}
		switch {
		case done:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
			quiet.Reset(settle)
		case time.Since(since) < patience:
			quiet.Reset(settle)
		default: // the changes go on for too long
			quiet.Reset(0)
		}
	}
}

// concerns reports whether a change of a name may change what the inputs are.
func (r *reloader) concerns(name string) bool {
	return r.names[name] || r.names[filepath.Dir(name)+"/*"]
}

// reload reads the files if they changed since they were read last, or in any case, and puts what they say in force if it is good. It
// reports false where the files change while they are read, so that they have to be read again.
func (r *reloader) reload(inAnyCase bool) bool {
	before := stateOf(r.inputs.Paths)
	if before == r.state && !inAnyCase {
		return true
	}
	cfg, inputs, err := r.source.reload(r.inputs)
	if !slices.Equal(inputs.Paths, r.inputs.Paths) { // there are other files now: what were they like before?
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
	if same && !inAnyCase {
		return true
	}
	if err == nil {
		err = r.use(cfg)
	}
	if err != nil {
		mistakes := mistakesOf(err)
		r.last.Store(&reloaded{time.Now(), mistakes})
		r.reloads.WithLabelValues("failure").Inc()
		r.log.Error("the new config is not in force, the old one stays", zap.Strings("mistakes", mistakes))
		return true
	}
	r.last.Store(&reloaded{at: time.Now()})
	r.reloads.WithLabelValues("success").Inc()
	r.info.Reset()
	r.info.WithLabelValues(cfg.Hash).Set(1)
	r.log.Info("a new config is in force", zap.String("hash", cfg.Hash), zap.Int("limits", len(cfg.Limits())))
	return true
}

// mistakesOf is an error for people, a mistake each.
func mistakesOf(err error) []string {
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

// stateOf tells whether files changed: where they really are, their sizes and when they were written.
func stateOf(paths []string) string {
	var b strings.Builder
	for _, path := range paths {
		really, err := filepath.EvalSymlinks(path)
		if err != nil {
			fmt.Fprintf(&b, "%s: %v\n", path, err)
			continue
		}
		if info, err := os.Stat(really); err != nil {
			fmt.Fprintf(&b, "%s: %v\n", path, err)
		} else {
			fmt.Fprintf(&b, "%s %d %d\n", really, info.Size(), info.ModTime().UnixNano())
		}
	}
	return b.String()
}

// writtenAfter reports whether a file was written after an instant, by the file system's clock.
func writtenAfter(paths []string, instant time.Time) bool {
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil && !info.IsDir() && info.ModTime().After(instant) && info.ModTime().Before(time.Now()) {
			return true
		}
	}
	return false
}

// watch has the watcher watch the directories in which something may change what the inputs are. It reports whether there are new ones.
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
			_ = w.Remove(dir) // it may be gone
		}
	}
	for dir := range wanted {
		if err := w.Add(dir); err != nil { // one that was replaced is another, and has to be added again
			r.log.Debug("a directory is not watched", zap.String("directory", dir), zap.Error(err))
			delete(wanted, dir)
		} else if !r.watched[dir] {
			added = true
		}
	}
	r.watched = wanted
	return added
}

// maxLinks is how many symbolic links of a path are followed, as the kernel does.
const maxLinks = 40

// addWatched adds, for an absolute path, the directories in which a part of it stands that may come, go or be replaced, and those parts:
// the file, what is missing of its directory, and each symbolic link on the way, as in a volume of Kubernetes, with what it leads to.
func addWatched(dirs, names map[string]bool, path string, links int) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		dirs[path], names[path+"/*"] = true, true
	}
	names[path] = true
	dir := filepath.Dir(path)
	for !exists(dir) && dir != filepath.Dir(dir) {
		names[dir] = true // where it may come back
		dir = filepath.Dir(dir)
	}
	dirs[dir] = true
	for p := path; p != filepath.Dir(p) && links > 0; p = filepath.Dir(p) {
		target, err := os.Readlink(p)
		if err != nil {
			continue // no link
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(p), target)
		}
		dirs[filepath.Dir(p)], names[p] = true, true
		links--
		addWatched(dirs, names, filepath.Join(target, strings.TrimPrefix(path, p)), links)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
