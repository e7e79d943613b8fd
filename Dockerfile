# syntax=docker/dockerfile:1
# A static sluice on an image with nothing else in it, for linux/amd64 and linux/arm64:
#   docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=v0.1.0 -t sluice .
FROM --platform=$BUILDPLATFORM docker.io/library/golang:1.26 AS build
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=devel
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY . .
# grpcnotrace: gRPC without golang.org/x/net/trace, whose templates keep the linker from leaving out what nothing calls.
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -tags grpcnotrace -ldflags "-s -w -X main.version=$VERSION" -o /sluice ./cmd/sluice
RUN --mount=type=cache,target=/go/pkg/mod \
    GOOS=$TARGETOS GOARCH=$TARGETARCH .ci/licenses /licenses

FROM gcr.io/distroless/static:nonroot
ARG VERSION=devel
LABEL org.opencontainers.image.title="sluice"
LABEL org.opencontainers.image.description="A token-bucket rate limiter for Envoy"
LABEL org.opencontainers.image.source="https://github.com/sluiceproxy/sluice"
LABEL org.opencontainers.image.licenses="Apache-2.0"
LABEL org.opencontainers.image.version="$VERSION"
COPY --from=build /sluice /sluice
COPY --from=build /licenses /licenses
# By number, so that Kubernetes can see that it is not root.
USER 65532:65532
EXPOSE 9001 9003
ENTRYPOINT ["/sluice"]
CMD ["run"]
