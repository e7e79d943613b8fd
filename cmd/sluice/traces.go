package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/sluiceproxy/sluice/limiter"
)

// traces sends spans by OTLP.
type traces struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
}

// lastSpans is how long close waits until the last spans are sent.
const lastSpans = 2 * time.Second

// newTraces returns what OpenTelemetry's environment variables describe, or nil
// if they name no endpoint. OpenTelemetry's library reads them: endpoint,
// protocol, headers, certificates, sampler, batches, and the service's name.
// newTraces does not connect yet.
func newTraces(log *zap.Logger) (*traces, error) {
	endpoint := false
	for _, name := range []string{"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} {
		text := os.Getenv(name)
		if text == "" {
			continue
		}
		endpoint = true
		if u, err := url.Parse(text); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("%s: must be http://host:port or https://host:port", name)
		}
	}
	disabled := strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") || os.Getenv("OTEL_TRACES_EXPORTER") == "none"
	if !endpoint || disabled {
		return nil, nil
	}
	protocol := os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
	if protocol == "" {
		protocol = os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL")
	}
	ctx := context.Background()
	var exporter *otlptrace.Exporter
	var err error
	switch protocol {
	case "grpc":
		exporter, err = otlptracegrpc.New(ctx)
	case "", "http/protobuf": // OpenTelemetry's default
		exporter, err = otlptracehttp.New(ctx)
	default:
		err = fmt.Errorf("OTEL_EXPORTER_OTLP_PROTOCOL %q: must be http/protobuf or grpc", protocol)
	}
	if err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	about, err := resource.New(ctx,
		resource.WithAttributes(
			attribute.String("service.name", "sluice"), attribute.String("service.version", buildVersion())),
		resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil && !errors.Is(err, resource.ErrPartialResource) {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	throttled := log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Minute, 1, 0)
	}))
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		throttled.Warn("traces are not sent", zap.Error(err))
	}))
	t := &traces{
		provider: sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(about)),
	}
	t.tracer = t.provider.Tracer("github.com/sluiceproxy/sluice")
	return t, nil
}

// close sends the spans that are left, within lastSpans.
func (t *traces) close() {
	ctx, cancel := context.WithTimeout(context.Background(), lastSpans)
	defer cancel()
	_ = t.provider.Shutdown(ctx) // the error handler logs the error
}

// tracedStore is a Store that makes a span for each Take.
type tracedStore struct {
	limiter.Store
	tracer trace.Tracer
	name   string
}

// Take implements limiter.Store.
func (s tracedStore) Take(ctx context.Context, charges []limiter.Charge, verdicts []limiter.Verdict) {
	ctx, span := s.tracer.Start(ctx, "sluice store", trace.WithSpanKind(trace.SpanKindClient))
	defer span.End()
	if !span.IsRecording() {
		s.Store.Take(ctx, charges, verdicts)
		return
	}
	var batch atomic.Int32
	s.Store.Take(limiter.WithBatchSize(ctx, &batch), charges, verdicts)
	span.SetAttributes(attribute.String("db.system.name", s.name), attribute.Int("sluice.buckets", len(charges)))
	if n := batch.Load(); n > 0 {
		span.SetAttributes(attribute.Int("db.operation.batch.size", int(n)))
	}
	for i := range verdicts {
		if err := verdicts[i].Err; err != nil && !errors.Is(err, context.Canceled) {
			span.SetAttributes(attribute.String("error.type", string(limiter.KindOf(err))))
			span.SetStatus(codes.Error, err.Error())
			return
		}
	}
}
