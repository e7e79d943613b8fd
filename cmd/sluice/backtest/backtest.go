// Package backtest plays access logs through a config, and says who would have
// been limited. Nothing is taken anywhere: the buckets are in this process, with
// a clock that the log sets.
package backtest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluiceproxy/sluice/cmd/sluice/accesslog"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Options configures Run.
type Options struct {
	Config  *policy.Config
	Against *policy.Config // the config to compare with; nil: none
	Logs    []*accesslog.Source
	// ConfigFile and AgainstFile are the names of the configs' files, for the report.
	ConfigFile, AgainstFile string
	// Since and Until bound the requests that are played, in microseconds since
	// 1970; 0 is no bound. Until is exclusive.
	Since, Until int64
	// Suggest also finds the least bursts and rates.
	Suggest bool
	// MaxLimited is the percentage of all requests, evenly spread, of which no more
	// may be denied; nil: any may.
	MaxLimited *float64
	// Progress is told how far Run is. nil tells nobody.
	Progress *Progress
}

// Progress says how far Run is. It is safe for concurrent use.
type Progress struct {
	Read  atomic.Int64 // bytes of the logs, compressed as they are
	Lines atomic.Int64
}

// The order of a log is not quite that of its times: a line is written when a
// request has ended. A line may come up to maxLate after a later one, and after
// up to maxEarly lines; what comes later still is played at the time at which it
// comes.
const (
	maxLate  = 60 * 1_000_000 // microseconds
	maxEarly = 16_384
)

const (
	// batchSize is about how many requests players are given at a time.
	batchSize = 512
	// maxGroup is how many requests are spread over one grain. Of more, parts are.
	maxGroup = 1 << 18
)

// Run plays the logs. When ctx ends it returns what it has found so far, with
// Report.Interrupted. The error is of a log that cannot be read; the report then
// has what was read of the others, and of this one before.
func Run(ctx context.Context, o Options) (*Report, error) {
	if o.Progress == nil {
		o.Progress = &Progress{}
	}
	r := &run{Options: o, grain: time.Microsecond}
	for _, l := range o.Logs {
		r.grain = max(r.grain, l.Grain)
	}
	r.worlds = append(r.worlds, newWorld(o.Config, 0))
	if o.Against != nil {
		r.worlds = append(r.worlds, newWorld(o.Against, 1))
	}
	for i := range readings(r.grain) {
		for _, w := range r.worlds {
			r.players = append(r.players, newPlayer(w, reading(i)))
		}
		if o.Suggest {
			r.suggesters = append(r.suggesters, newSuggester(r.worlds[0], reading(i)))
		}
	}
	// With few keys hardly anything is kept, and the collector would run after
	// every few thousand lines.
	if before := debug.SetGCPercent(fewKeysGC); before != defaultGC {
		debug.SetGCPercent(before) // GOGC says otherwise
	} else {
		defer debug.SetGCPercent(before)
	}
	stop := r.startPlayers()
	err := r.read(ctx)
	r.flush()
	r.send()
	stop()
	out := r.report(ctx.Err() != nil)
	out.Verdict = r.judge(out, err)
	return out, err
}

// The percentages of the garbage collector while there are at most fewKeys keys and
// when there are more, whose memory counts; and what it is by default.
const (
	fewKeysGC  = 200
	fewKeys    = 20_000
	manyKeysGC = 60
	defaultGC  = 100
)

// reading is how the requests of one grain are played.
type reading int

const (
	spread reading = iota // of each bucket, evenly
	atOnce                // all at its beginning
)

// readings returns how many readings a log with a grain has.
func readings(grain time.Duration) int {
	if grain > time.Microsecond {
		return 2
	}
	return 1
}

// run is the state of Run. Its methods are called by one goroutine.
type run struct {
	Options
	grain      time.Duration
	worlds     []*world
	players    []*player
	suggesters []*suggester

	group []*request // of one grain
	at    int64      // the time of the latest request
	batch []*request

	counts   accesslog.Counts
	late     int64 // requests that came after maxLate
	outside  int64 // requests outside of Since and Until
	from, to int64
	requests int64

	hasManyKeys bool // more than fewKeys
}

// request is a request with what it draws, by world.
type request struct {
	at    int64 // microseconds since 1970
	draws [2]drawn
	// duration is how long it took, in microseconds.
	duration int64
}

// stream reads one log. Its requests come in the order of their times.
type stream struct {
	source  *accesslog.Source
	jobs    chan *job // in the order of the lines
	err     error     // set before jobs is closed
	isOver  bool
	pending []*request // in the order of their times
	newest  int64
}

// job is a Chunk that a worker parses.
type job struct {
	source   *accesslog.Source
	chunk    accesslog.Chunk
	done     chan struct{}
	counts   accesslog.Counts
	requests []request
	outside  int64 // requests outside of Since and Until
}

// read reads all logs and plays their requests in the order of their times.
func (r *run) read(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	work := make(chan *job, 4)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() { r.worker(ctx, work) })
	}
	defer workers.Wait()
	defer cancel()
	waiting := slices.Clone(r.Logs)
	slices.SortStableFunc(waiting, func(a, b *accesslog.Source) int {
		switch {
		case a.First < b.First:
			return -1
		case a.First > b.First:
			return 1
		}
		return 0
	})
	var active []*stream
	var failed error
	for ctx.Err() == nil {
		// The next request is the earliest of all logs. A log is opened when its
		// time comes, as there may be many.
		next := -1
		for i := 0; i < len(active); i++ {
			s := active[i]
			if err := r.fill(ctx, s); err != nil {
				failed = errors.Join(failed, err)
			}
			if len(s.pending) == 0 {
				active = slices.Delete(active, i, i+1)
				i--
				continue
			}
			if next < 0 || s.pending[0].at < active[next].pending[0].at {
				next = i
			}
		}
		if len(waiting) > 0 && (next < 0 || waiting[0].First-maxLate <= active[next].pending[0].at) {
			s, err := r.open(ctx, waiting[0], work)
			if err != nil {
				failed = errors.Join(failed, err)
			} else {
				active = append(active, s)
			}
			waiting = waiting[1:]
			continue
		}
		if next < 0 {
			return failed
		}
		// All that comes before the other logs is played at once.
		until := int64(1<<63 - 1)
		for i, s := range active {
			if i != next {
				until = min(until, s.pending[0].at)
			}
		}
		if len(waiting) > 0 {
			until = min(until, waiting[0].First-maxLate-1)
		}
		s := active[next]
		for s.isReady() && s.pending[0].at <= until {
			r.play(s.pending[0])
			s.pending = s.pending[1:]
		}
	}
	return failed
}

// open starts to read a log.
func (r *run) open(ctx context.Context, source *accesslog.Source, work chan<- *job) (*stream, error) {
	reader, err := source.Start()
	if err != nil {
		return nil, err //nolint:wrapcheck // it names the log
	}
	s := &stream{source: source, jobs: make(chan *job, 8)}
	go func() {
		defer close(s.jobs)
		defer reader.Close()
		read := int64(0)
		for {
			chunk, err := reader.Next()
			r.Progress.Read.Add(reader.Read() - read)
			read = reader.Read()
			if err != nil {
				s.err = err
				return
			}
			j := &job{source: source, chunk: chunk, done: make(chan struct{})}
			for _, to := range []chan<- *job{s.jobs, work} {
				select {
				case to <- j:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return s, nil
}

// worker parses chunks until ctx ends, and finds what their requests draw.
func (r *run) worker(ctx context.Context, work <-chan *job) {
	parsers := make(map[*accesslog.Source]*accesslog.Parser)
	var drawers []*drawer
	for _, w := range r.worlds {
		drawers = append(drawers, &drawer{world: w})
	}
	usual := 0 // requests of a chunk
	for {
		var j *job
		select {
		case j = <-work:
		case <-ctx.Done():
			return
		}
		p := parsers[j.source]
		if p == nil {
			p = j.source.NewParser()
			parsers[j.source] = p
		}
		j.requests = make([]request, 0, usual+usual/8)
		j.counts = p.Parse(j.chunk, func(e *accesslog.Entry) {
			if r.Since > 0 && e.At < r.Since || r.Until > 0 && e.At >= r.Until {
				j.outside++
				return
			}
			q := request{at: e.At}
			if e.End.Duration != nil {
				q.duration = e.End.Duration.Microseconds()
			}
			for i, d := range drawers {
				q.draws[i] = d.draw(e)
			}
			j.requests = append(j.requests, q)
		})
		usual = len(j.requests)
		j.chunk.Text = ""
		close(j.done)
	}
}

// isReady reports that no earlier request can come than the first one pending.
func (s *stream) isReady() bool {
	return len(s.pending) > 0 &&
		(s.isOver || len(s.pending) > maxEarly || s.newest-s.pending[0].at > maxLate)
}

// fill reads until s is ready or over.
func (r *run) fill(ctx context.Context, s *stream) error {
	for !s.isReady() && !s.isOver {
		var j *job
		var ok bool
		select {
		case j, ok = <-s.jobs:
		case <-ctx.Done():
			s.isOver = true
			return nil
		}
		if !ok {
			s.isOver = true
			if s.err != nil && !isEOF(s.err) {
				return s.err
			}
			return nil
		}
		select {
		case <-j.done:
		case <-ctx.Done():
			s.isOver = true
			return nil
		}
		r.add(s, j)
	}
	return nil
}

// add adds the requests of a chunk to those of its stream.
func (r *run) add(s *stream, j *job) {
	r.counts.Lines += j.counts.Lines
	r.counts.Skipped += j.counts.Skipped
	r.counts.NoRequest += j.counts.NoRequest
	if len(r.counts.Bad) < maxBad {
		r.counts.Bad = append(r.counts.Bad, j.counts.Bad[:min(len(j.counts.Bad), maxBad-len(r.counts.Bad))]...)
	}
	r.Progress.Lines.Add(j.counts.Lines)
	r.outside += j.outside
	for i := range j.requests {
		q := &j.requests[i]
		s.newest = max(s.newest, q.at)
		// Most lines are in order.
		at := len(s.pending)
		if at > 0 && s.pending[at-1].at > q.at {
			at, _ = slices.BinarySearchFunc(s.pending, q.at, func(p *request, at int64) int {
				if p.at > at {
					return 1
				}
				return -1
			})
		}
		s.pending = slices.Insert(s.pending, at, q)
	}
	keys := int64(0)
	for _, w := range r.worlds {
		keys += w.keys.Load()
	}
	if keys > fewKeys && !r.hasManyKeys {
		r.hasManyKeys = true
		if before := debug.SetGCPercent(manyKeysGC); before != fewKeysGC {
			debug.SetGCPercent(before)
		}
	}
}

// play adds the next request to its group, and plays the group before if it
// belongs to another.
func (r *run) play(q *request) {
	if q.at < r.at {
		r.late++
		q.at = r.at
	}
	r.at = q.at
	if r.requests == 0 {
		r.from = q.at
	}
	r.requests++
	r.to = q.at
	grain := r.grain.Microseconds()
	if n := len(r.group); n > 0 && (r.group[0].at/grain != q.at/grain || n == maxGroup) {
		r.flush()
	}
	r.group = append(r.group, q)
}

// flush gives the group to the players. It spreads the requests of each bucket
// evenly over the grain.
func (r *run) flush() {
	if len(r.group) == 0 {
		return
	}
	grain := r.grain.Microseconds()
	begin := r.group[0].at / grain * grain
	for _, q := range r.group {
		for w := range r.worlds {
			for _, k := range q.draws[w].keys {
				k.inGroup++
			}
		}
	}
	for _, q := range r.group {
		for w := range r.worlds {
			d := &q.draws[w]
			for i, k := range d.keys {
				k.at = max(k.at, begin+k.spread*grain/k.inGroup)
				d.spread[i] = k.at
				if k.spread++; k.spread == k.inGroup {
					k.spread, k.inGroup = 0, 0
				}
			}
		}
	}
	for _, q := range r.group {
		q.at = begin
	}
	r.batch = append(r.batch, r.group...)
	r.group = r.group[:0]
	if len(r.batch) >= batchSize {
		r.send()
	}
}

// send gives the batch to the players.
func (r *run) send() {
	if len(r.batch) == 0 {
		return
	}
	for _, p := range r.players {
		p.work <- r.batch
	}
	for _, s := range r.suggesters {
		s.work <- r.batch
	}
	r.batch = nil
}

// startPlayers starts the players. stop waits until they have played all.
func (r *run) startPlayers() (stop func()) {
	var done []chan struct{}
	start := func(work <-chan []*request, play func(*request)) {
		over := make(chan struct{})
		done = append(done, over)
		go func() {
			defer close(over)
			for batch := range work {
				for _, q := range batch {
					play(q)
				}
			}
		}()
	}
	for _, p := range r.players {
		start(p.work, p.play)
	}
	for _, s := range r.suggesters {
		start(s.work, s.play)
	}
	return func() {
		for _, p := range r.players {
			close(p.work)
		}
		for _, s := range r.suggesters {
			close(s.work)
		}
		for _, over := range done {
			<-over
		}
	}
}

// Missing returns what the config's limits read that a log does not hold, and
// what is assumed for it, in words.
func Missing(cfg *policy.Config, logs []*accesslog.Source) (all []string) {
	for _, d := range cfg.Describe() {
		for _, name := range d.Reads {
			if !slices.ContainsFunc(logs, func(s *accesslog.Source) bool { return !s.Holds(name) }) {
				continue
			}
			where := "the log does not hold"
			if len(logs) > 1 {
				where = "not all logs hold"
			}
			all = append(all, fmt.Sprintf("%s reads %s, which %s: %s", d.Limit.Name, name, where, assumed(name, &d)))
		}
	}
	return all
}

// assumed says what is assumed for an attribute that a log does not hold.
func assumed(name string, d *policy.Described) string {
	switch name {
	case "request.method":
		return "every method is taken to be GET"
	case "request.path", "request.url_path":
		return "every path is taken to be /"
	case "request.query":
		return "every query is taken to be empty"
	case "request.duration":
		return "every request is taken to end when it begins"
	case "response.code", "response.size", "response.total_size", "request.total_size":
		return "it is taken to be 0"
	case "source.port", "destination.port":
		return "it is taken to be 0"
	}
	text := "it is taken to be absent"
	if slices.ContainsFunc(d.Key, func(k string) bool { return k == name }) {
		text += ", for which the limit has absent: " + d.Absent
	}
	return text + "; name a field with --field"
}
