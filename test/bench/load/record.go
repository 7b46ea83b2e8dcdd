package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// What a contestant is. Only ours are compared, and only peers are rivals: a
// relay carries bytes to a proxy across the network without encryption, raw has
// nobody in between, a variant is ours in another version or place.
const (
	classRaw     = "raw"
	classOurs    = "ours"
	classVariant = "variant"
	classPeer    = "peer"
	classRelay   = "relay"
)

var classes = []string{classRaw, classOurs, classVariant, classPeer, classRelay}

// figures are what a test measured, by name. A name ends in its unit.
type figures map[string]float64

const (
	figMBps          = "MBps"
	figFair          = "fair"
	figBusy          = "busy" // share of all CPUs
	figPerSecond     = "per_s"
	figP50           = "p50_us"
	figP99           = "p99_us"
	figFailed        = "failed"
	figLoss          = "loss"
	figOpen          = "open"
	figClientCPU     = "client_cpu_s_per_GB"
	figServerCPU     = "server_cpu_s_per_GB"
	figClientCPUEach = "client_cpu_us"
	figServerCPUEach = "server_cpu_us"
	figClientBare    = "client_bare_MB"
	figServerBare    = "server_bare_MB"
	figClientMB      = "client_MB"
	figServerMB      = "server_MB"
	figClientKBEach  = "client_KB_each"
	figServerKBEach  = "server_KB_each"
)

// A record is one test of one contestant in one round.
type record struct {
	When    string  `json:"when"`
	Name    string  `json:"name"`
	Class   string  `json:"class"`
	Mode    string  `json:"mode"`
	Path    string  `json:"path,omitempty"`
	Round   int     `json:"round"`
	Test    string  `json:"test"`
	Figures figures `json:"figures,omitempty"`
	Error   string  `json:"error,omitempty"`
	Waited  float64 `json:"waited_s"` // for a quiet machine; negative: it never was
}

// brief is the figures that a person watching wants to see.
func (r record) brief() string {
	var all []string
	for _, name := range []string{
		figMBps, figPerSecond, figP50, figP99, figFailed, figLoss, figOpen, figClientCPU, figServerCPU,
		figClientMB, figServerMB, figClientKBEach, figServerKBEach,
	} {
		if v, ok := r.Figures[name]; ok && (name != figFailed || v > 0) {
			all = append(all, fmt.Sprintf("%s=%.4g", name, v))
		}
	}
	if r.Error != "" {
		all = append(all, "ERROR "+strings.ReplaceAll(r.Error, "\n", "; "))
	}
	return strings.Join(all, " ")
}

// readRecords reads lines of JSON.
func readRecords(in io.Reader) ([]record, error) {
	var all []record
	for d := json.NewDecoder(in); ; {
		var r record
		if err := d.Decode(&r); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
}
