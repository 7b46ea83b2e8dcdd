package cmd

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Emit receives the values of one scrape.
type Emit struct {
	out chan<- prometheus.Metric
}

// Counter emits a value that only grows. labels are pairs of name and value.
func (e *Emit) Counter(name, help string, value uint64, labels ...string) {
	e.emit(prometheus.CounterValue, name, help, float64(value), labels)
}

// Gauge emits a value that goes up and down. labels are pairs of name and value.
func (e *Emit) Gauge(name, help string, value float64, labels ...string) {
	e.emit(prometheus.GaugeValue, name, help, value, labels)
}

func (e *Emit) emit(kind prometheus.ValueType, name, help string, value float64, labels []string) {
	names := make([]string, 0, len(labels)/2)
	values := make([]string, 0, len(labels)/2)
	for i := 0; i+1 < len(labels); i += 2 {
		names = append(names, labels[i])
		values = append(values, labels[i+1])
	}
	e.out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, names, nil), kind, value, values...)
}

// collector reads an engine's counters when a scrape comes, so that the packet
// road counts with its own atomics and knows nothing of Prometheus.
type collector func(*Emit)

// NewCollector returns a collector that calls read at each scrape.
func NewCollector(read func(*Emit)) prometheus.Collector { return collector(read) }

// Describe sends nothing: which labels exist is known only once they counted.
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) { c(&Emit{out: out}) }
