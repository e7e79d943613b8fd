package authz

import (
	"context"
	"errors"
	"io"
	"strconv"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	logdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	logv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sluiceproxy/sluice/limiter"
	"github.com/sluiceproxy/sluice/limiter/policy"
)

// Settler is a store that settles what its takes hold. Settle fills results[i]
// with what became of settlements[i], each of which is executed at most once,
// and returns by the deadline of ctx. It is safe for concurrent use.
type Settler interface {
	Settle(ctx context.Context, settlements []limiter.Settlement, results []limiter.Settled)
}

const (
	// settleField is the entry of the dynamic metadata with the sealed text.
	settleField = "settle"
	// logName is the log_name of the access log that sluice envoy prints.
	logName = "sluice"
	// maxQueued is how many settlements wait at most; those beyond it fail.
	maxQueued = 10_000
	// settleBatch is how many settlements one call has at most, and
	// settleWorkers how many calls are under way at most.
	settleBatch, settleWorkers = 50, 16
	// settleTimeout bounds one call; the store's own timeout may be shorter.
	settleTimeout = time.Second
)

// ending is a settlement that waits for the store.
type ending struct {
	limiter.Settlement
	isMistake bool // the limit's settle failed, so that what was taken stands
}

// settling settles the requests whose ends Envoy's access log reports.
type settling struct {
	sealer  *sealer
	store   Settler
	queue   chan ending
	workers sync.WaitGroup
	drained chan struct{} // closed when no more ends are read

	settlements *prometheus.CounterVec
	returned    *prometheus.CounterVec
	surcharged  *prometheus.CounterVec
	forgiven    *prometheus.CounterVec
	expired     *prometheus.CounterVec
}

func newSettling(store Settler, metrics prometheus.Registerer) *settling {
	byLimit := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"limit"})
	}
	s := &settling{
		sealer:  newSealer(),
		drained: make(chan struct{}),
		store:   store,
		queue:   make(chan ending, maxQueued),
		settlements: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sluice_settlements_total",
			Help: "Total number of settlements, by limit and by what became of them.",
		}, []string{"limit", "result"}),
		returned:   byLimit("sluice_tokens_returned_total", "Total number of tokens that settlements returned."),
		surcharged: byLimit("sluice_tokens_surcharged_total", "Total number of tokens that settlements took besides what was held."),
		forgiven: byLimit("sluice_tokens_forgiven_total",
			"Total number of tokens that requests used and that no bucket paid, as its debt was the largest."),
		expired: byLimit("sluice_holds_expired_total",
			"Total number of holds that ended without a settlement, so that all that was held counts as spent."),
	}
	metrics.MustRegister(s.settlements, s.returned, s.surcharged, s.forgiven, s.expired)
	return s
}

// run settles what is queued until ctx ends, and then what is left.
func (s *settling) run(ctx context.Context) {
	for range settleWorkers {
		s.workers.Go(func() {
			for {
				select {
				case first := <-s.queue:
					s.settle(first)
				case <-ctx.Done():
					for {
						select {
						case first := <-s.queue:
							s.settle(first)
						default:
							return
						}
					}
				}
			}
		})
	}
	s.workers.Wait()
}

// settle settles first and what else is queued, in one call.
func (s *settling) settle(first ending) {
	batch := []ending{first}
gather:
	for len(batch) < settleBatch {
		select {
		case next := <-s.queue:
			batch = append(batch, next)
		default:
			break gather
		}
	}
	settlements := make([]limiter.Settlement, len(batch))
	for i := range batch {
		settlements[i] = batch[i].Settlement
	}
	results := make([]limiter.Settled, len(batch))
	ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
	defer cancel()
	s.store.Settle(ctx, settlements, results)
	for i := range batch {
		s.count(&batch[i], &results[i])
	}
}

// resultOf names what became of a settlement.
func resultOf(e *ending, r *limiter.Settled) string {
	switch {
	case r.Err != nil:
		return "failed"
	case !r.Known:
		return "unknown"
	case r.Repeated:
		return "repeated"
	case e.isMistake:
		return "mistake"
	case r.Late:
		return "late"
	case r.Returned > 0:
		return "returned"
	case r.Surcharged > 0 || r.Forgiven > 0:
		return "surcharged"
	}
	return "unchanged"
}

// count records what became of a settlement.
func (s *settling) count(e *ending, r *limiter.Settled) {
	limit := e.Limit.Name
	s.settlements.WithLabelValues(limit, resultOf(e, r)).Inc()
	for _, c := range []struct {
		counter *prometheus.CounterVec
		n       int64
	}{{s.returned, r.Returned}, {s.surcharged, r.Surcharged}, {s.forgiven, r.Forgiven}, {s.expired, int64(r.Expired)}} {
		if c.n > 0 {
			c.counter.WithLabelValues(limit).Add(float64(c.n))
		}
	}
}

// sawExpired counts the holds that takes found to have ended by themselves.
func (s *settling) sawExpired(d *limiter.Decision) {
	for i := range d.Verdicts {
		if n := d.Verdicts[i].Expired; n > 0 {
			s.expired.WithLabelValues(d.Charges[i].Limit.Name).Add(float64(n))
		}
	}
}

// accessLog is Envoy's access log service.
type accessLog struct {
	logv3.UnimplementedAccessLogServiceServer
	server *Server
}

// StreamAccessLogs implements the service. It reads one message after another
// and answers when Envoy ends the stream.
func (a accessLog) StreamAccessLogs(stream logv3.AccessLogService_StreamAccessLogsServer) error {
	if !a.server.config.Load().Settles() {
		return status.Error(codes.Unimplemented, "no limit of the config settles")
	}
	type received struct {
		message *logv3.StreamAccessLogsMessage
		err     error
	}
	messages := make(chan received)
	go func() {
		for {
			message, err := stream.Recv()
			select {
			case messages <- received{message, err}:
			case <-stream.Context().Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	isOurs := false
	for first := true; ; first = false {
		select {
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-a.server.settling.drained:
			return status.Error(codes.Unavailable, "the sidecar is shutting down")
		case r := <-messages:
			if errors.Is(r.err, io.EOF) {
				return stream.SendAndClose(&logv3.StreamAccessLogsResponse{})
			}
			if r.err != nil {
				return r.err
			}
			if first || r.message.GetIdentifier() != nil {
				isOurs = r.message.GetIdentifier().GetLogName() == logName
			}
			if !isOurs {
				continue
			}
			for _, entry := range r.message.GetHttpLogs().GetLogEntry() {
				a.server.ended(entry)
			}
		}
	}
}

// ended settles a request by its entry in the access log.
func (s *Server) ended(entry *logdatav3.HTTPAccessLogEntry) {
	common := entry.GetCommonProperties()
	if t := common.GetAccessLogType(); t != logdatav3.AccessLogType_DownstreamEnd && t != logdatav3.AccessLogType_NotSet ||
		common.GetIntermediateLogEntry() {
		return
	}
	text := sealedText(common.GetMetadata())
	if text == "" {
		return
	}
	config := s.config.Load()
	all, err := s.settling.sealer.open(config, text)
	if err != nil {
		s.settling.settlements.WithLabelValues("", "forged").Inc()
		return
	}
	end := endOf(entry)
	for _, h := range all {
		cost, err := config.Settle(h.domain, h.limit, end, h.hold.Tokens)
		if err != nil {
			s.report.mistaken(err)
		}
		e := ending{Settlement: limiter.Settlement{
			Limit: &limiter.Limit{Domain: h.domain, Name: h.limit}, Key: h.key, Hold: h.hold, Cost: cost,
		}, isMistake: err != nil}
		select {
		case s.settling.queue <- e:
		default:
			s.settling.settlements.WithLabelValues(h.limit, "failed").Inc()
		}
	}
}

// sealedText returns the sealed text in the metadata of the filters.
func sealedText(metadata *corev3.Metadata) string {
	for _, filter := range metadata.GetFilterMetadata() {
		if text := filter.GetFields()[settleField].GetStringValue(); text != "" {
			return text
		}
	}
	return ""
}

// endOf returns what an entry says of the end of a request.
func endOf(entry *logdatav3.HTTPAccessLogEntry) *policy.End {
	common, request, response := entry.GetCommonProperties(), entry.GetRequest(), entry.GetResponse()
	end := &policy.End{
		Method:           corev3.RequestMethod_name[int32(request.GetRequestMethod())],
		Scheme:           request.GetScheme(),
		Host:             request.GetAuthority(),
		Path:             request.GetPath(),
		Protocol:         protocols[entry.GetProtocolVersion()],
		ID:               request.GetRequestId(),
		Time:             common.GetStartTime().AsTime(),
		Duration:         common.GetTimeToLastDownstreamTxByte().AsDuration(),
		RequestSize:      int64(request.GetRequestBodyBytes()),
		RequestTotalSize: int64(request.GetRequestBodyBytes() + request.GetRequestHeadersBytes()),
		Code:             int64(response.GetResponseCode().GetValue()),
		CodeDetails:      response.GetResponseCodeDetails(),
		Flags:            flagsOf(common.GetResponseFlags()),
		Headers:          response.GetResponseHeaders(),
		Trailers:         response.GetResponseTrailers(),
		Size:             int64(response.GetResponseBodyBytes()),
		TotalSize:        int64(response.GetResponseBodyBytes() + response.GetResponseHeadersBytes()),
		Metadata:         common.GetMetadata().GetFilterMetadata(),
	}
	if original := request.GetOriginalPath(); original != "" {
		end.Path = original
	}
	end.GRPCStatus = grpcStatusOf(end)
	return end
}

// protocols has the names of HTTP versions, as in checks.
var protocols = map[logdatav3.HTTPAccessLogEntry_HTTPVersion]string{
	logdatav3.HTTPAccessLogEntry_HTTP10: "HTTP/1.0",
	logdatav3.HTTPAccessLogEntry_HTTP11: "HTTP/1.1",
	logdatav3.HTTPAccessLogEntry_HTTP2:  "HTTP/2",
	logdatav3.HTTPAccessLogEntry_HTTP3:  "HTTP/3",
}

// grpcStatusOf returns the grpc-status of a response: a trailer, or a header if
// the response has trailers only. It is nil if there is none.
func grpcStatusOf(end *policy.End) *int64 {
	text, ok := end.Trailers["grpc-status"]
	if !ok {
		text = end.Headers["grpc-status"]
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 0 {
		return nil
	}
	return &n
}

// flagsOf returns the short names of response flags, in the order of Envoy's
// documentation of %RESPONSE_FLAGS%.
func flagsOf(f *logdatav3.ResponseFlags) (names []string) {
	if f == nil {
		return nil
	}
	for _, flag := range []struct {
		isSet bool
		name  string
	}{
		{f.FailedLocalHealthcheck, "LH"},
		{f.NoHealthyUpstream, "UH"},
		{f.UpstreamRequestTimeout, "UT"},
		{f.LocalReset, "LR"},
		{f.UpstreamRemoteReset, "UR"},
		{f.UpstreamConnectionFailure, "UF"},
		{f.UpstreamConnectionTermination, "UC"},
		{f.UpstreamOverflow, "UO"},
		{f.NoRouteFound, "NR"},
		{f.DelayInjected, "DI"},
		{f.FaultInjected, "FI"},
		{f.RateLimited, "RL"},
		{f.UnauthorizedDetails != nil, "UAEX"},
		{f.RateLimitServiceError, "RLSE"},
		{f.DownstreamConnectionTermination, "DC"},
		{f.UpstreamRetryLimitExceeded, "URX"},
		{f.StreamIdleTimeout, "SI"},
		{f.InvalidEnvoyRequestHeaders, "IH"},
		{f.DownstreamProtocolError, "DPE"},
		{f.UpstreamMaxStreamDurationReached, "UMSDR"},
		{f.ResponseFromCacheFilter, "RFCF"},
		{f.NoFilterConfigFound, "NFCF"},
		{f.DurationTimeout, "DT"},
		{f.UpstreamProtocolError, "UPE"},
		{f.NoClusterFound, "NC"},
		{f.OverloadManager, "OM"},
		{f.DnsResolutionFailure, "DF"},
		{f.DownstreamRemoteReset, "DR"},
	} {
		if flag.isSet {
			names = append(names, flag.name)
		}
	}
	return names
}
