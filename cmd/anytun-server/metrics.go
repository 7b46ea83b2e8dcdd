package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/anytun-go/anytun/anytun/registry"
	"github.com/anytun-go/anytun/anytun/tun"
	"github.com/anytun-go/anytun/cmd"
)

// emitCluster reads the counters of what only this command has: the registry,
// the TUN device and the announcer.
func (g *gateway) emitCluster(e *cmd.Emit) {
	g.emitRegistry(e)
	if g.device != nil {
		emitDevice(e, g.device.Stats())
	}
	if g.announcer != nil {
		g.emitAnnouncer(e)
	}
}

func (g *gateway) emitRegistry(e *cmd.Emit) {
	s := g.bus.Stats()
	e.Gauge("anytun_registry_ready", "1 when what is published now is sent now.", number(g.bus.Ready() == nil))
	for t := registry.Type(1); t < registry.NumTypes; t++ {
		for _, d := range []struct {
			direction string
			traffic   registry.Traffic
		}{{"in", s.In[t]}, {"out", s.Out[t]}} {
			labels := []string{"type", t.String(), "direction", d.direction}
			e.Counter("anytun_registry_messages_total", "Messages between servers.", d.traffic.Messages, labels...)
			e.Counter("anytun_registry_records_total", "Records in them: locations, watermarks and so on.", d.traffic.Records, labels...)
			e.Counter("anytun_registry_bytes_total", "Bytes of those messages: all that servers synchronise.", d.traffic.Bytes, labels...)
		}
	}
	e.Counter("anytun_registry_reconnects_total", "Times that the registry's engine was reached again.", s.Reconnects)
	e.Counter("anytun_registry_snapshots_total", "Snapshots fetched from another server.", s.Snapshots)
	e.Gauge("anytun_registry_peers", "Other servers heard lately.", float64(s.Peers))
	e.Gauge("anytun_registry_pending", "Records that wait to be published.", float64(s.Pending))
	for d := range registry.Drop(registry.NumDrops) {
		e.Counter("anytun_registry_dropped_total", "What wasn't published or delivered.", s.Drops[d], "reason", d.String())
	}
}

func emitDevice(e *cmd.Emit, s tun.Stats) {
	for _, d := range []struct {
		direction string
		traffic   tun.Traffic
	}{{"in", s.Read}, {"out", s.Written}} {
		labels := []string{"direction", d.direction}
		e.Counter("anytun_tun_packets_total", "Packets from (in) and to (out) the TUN device.", d.traffic.Packets, labels...)
		e.Counter("anytun_tun_bytes_total", "Bytes of those packets.", d.traffic.Bytes, labels...)
		e.Counter("anytun_tun_messages_total", "System calls that moved them: one packet or many.", d.traffic.Messages, labels...)
	}
	for d := range tun.DropReason(tun.NumDropReasons) {
		e.Counter("anytun_tun_dropped_total", "Packets lost at the TUN device.", s.Drops[d], "reason", d.String())
	}
}

func (g *gateway) emitAnnouncer(e *cmd.Emit) {
	s := g.announcer.Status()
	e.Gauge("anytun_announcing", "1 while routers are told to send clients here.", number(s.Announcing))
	e.Gauge("anytun_healthy", "1 when the last self-checks went well.", number(s.Healthy))
	for _, p := range s.Peers {
		e.Gauge("anytun_bgp_established", "1 when the BGP session is up.", number(p.State == "established"), "peer", p.Addr.String())
		e.Gauge("anytun_bgp_announced", "Prefixes that the peer was told.", float64(p.Announced), "peer", p.Addr.String())
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// clusterFacts are the status page's lines about the cluster.
func (g *gateway) clusterFacts() []cmd.Fact {
	var facts []cmd.Fact
	if t, ok := g.server.Tun(); ok {
		var list []string
		for _, p := range g.egress.prefixes {
			if p.IsSingleIP() {
				list = append(list, p.Addr().String())
			} else {
				list = append(list, p.String())
			}
		}
		facts = append(facts,
			cmd.Fact{Name: "egress", Value: g.device.Name() + ", " + strings.Join(list, " ")},
			cmd.Fact{Name: "packets out, in", Value: fmt.Sprint(t.PacketsOut, ", ", t.PacketsIn)},
		)
	}
	if !g.registry.alone() {
		state := "connected, " + strconv.Itoa(g.bus.Stats().Peers) + " other servers"
		if err := g.bus.Ready(); err != nil {
			state = "not connected: " + err.Error()
		}
		facts = append(facts, cmd.Fact{Name: "registry", Value: state})
	}
	if g.announcer == nil {
		return facts
	}
	s := g.announcer.Status()
	state := "announcing"
	switch {
	case s.Draining:
		state = "withdrawn, draining"
	case !s.Healthy:
		state = "withdrawn: " + s.Why
	case !s.Announcing:
		state = "withdrawn"
	}
	facts = append(facts, cmd.Fact{Name: "routes", Value: state})
	for _, p := range s.Peers {
		value := p.State
		if p.BFD != "" {
			value += ", bfd " + p.BFD
		}
		if p.Why != "" {
			value += ": " + p.Why
		}
		facts = append(facts, cmd.Fact{Name: "bgp " + p.Addr.String(), Value: value})
	}
	return facts
}
