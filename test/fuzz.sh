#!/usr/bin/env bash
# Runs every fuzz target of the module for a while, one after the other: go test
# fuzzes one target at a time.
#
# usage: fuzz.sh DURATION
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?duration, such as 30s}
count=0
for package in $(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./...); do
  for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
    echo "$package $target"
    # Inputs of a running netstack depend on those before, so minimizing one may never end.
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "$package"
    count=$((count + 1))
  done
done
echo "fuzzed $count targets for $time each"
[ "$count" -gt 0 ]
