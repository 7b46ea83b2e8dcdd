# Everything that CI runs is a target here; plain "go build ./cmd/..." works without make.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.NOTPARALLEL:

GO ?= go
LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.11.4
CLIENT := ./anytun/wire ./anytun/session ./anytun/udp ./anytun/client ./netstack ./proxy/... ./cmd/anytun-proxy
UNIT = $$($(GO) list ./... | grep -v /test/lab)
# What takes long and is all about goroutines runs under the race detector only.
QUICK = $$($(GO) list ./... | grep -vE '/(test/lab|test/gateway|anytun/announce|anytun/registry/nats)$$')
# Of go test -v: every line that isn't about a test beginning or passing, so skips stay with their reasons.
SHOW := grep -vE '^(=== (RUN|PAUSE|CONT|NAME)| *--- PASS: |PASS$$)'

# Where missing programs could be installed, a test that finds one missing fails instead of skipping.
ifneq ($(filter true,$(CI))$(filter 0,$(shell id -u)),)
export ANYTUN_REQUIRE := 1
endif

.PHONY: build test deps fmt vet unit race microbench netns lab e2e fuzz bench bench-peers lint cross check install clean
build:
	$(GO) build -trimpath -o bin/ ./cmd/anytun-proxy ./cmd/anytun-server
test: deps fmt vet unit race microbench netns
check: test lint cross
deps:
	test/deps/install.sh
	$(GO) mod download
fmt:
	@files=$$(gofmt -l .); if [ -n "$$files" ]; then echo "gofmt would change:"; echo "$$files"; exit 1; fi
vet:
	$(GO) vet ./...
	GOOS=darwin $(GO) vet $(CLIENT)
	GOOS=windows $(GO) vet $(CLIENT)
unit:
	$(GO) test -v -timeout 5m $(QUICK) | $(SHOW)
race:
	$(GO) test -race -short -shuffle=on -timeout 10m $(UNIT)
netns:
	$(GO) test -v -count=1 -timeout 15m ./test/lab | $(SHOW)
# The anycast cluster of the tests, left standing for a person until Ctrl-C.
lab:
	$(GO) test -c -o bin/lab.test ./test/lab
	cd test/lab && ANYTUN_LAB_STAND=1 ../../bin/lab.test -test.run '^TestStand$$' -test.v
e2e:
	$(GO) test -count=1 ./test/e2e/... ./test/gateway/...
fuzz:
	test/fuzz.sh 30s
# Each benchmark runs once, so that none rots.
microbench:
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 2m $(UNIT)
# Us, raw TCP and the peers that are installed, in namespaces: about 20 minutes. test/bench/README.md.
bench:
	test/bench/bench
bench-peers:
	test/bench/peers
lint:
	$(GO) run $(LINT) run
cross:
	for t in darwin/amd64 darwin/arm64 windows/amd64 linux/arm64; do \
	  GOOS=$${t%/*} GOARCH=$${t#*/} $(GO) build -trimpath -o dist/$${t%/*}-$${t#*/}/ ./cmd/anytun-proxy; done
	GOOS=linux GOARCH=arm64 $(GO) build -trimpath -o dist/linux-arm64/ ./cmd/anytun-server
install:
	$(GO) install -trimpath ./cmd/anytun-proxy ./cmd/anytun-server
clean:
	rm -rf bin dist
