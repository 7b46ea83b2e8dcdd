package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/anytun-go/anytun/anytun/client"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/cmd"
)

func (g *gateway) adminPages() *cmd.Admin {
	reads := []func(*cmd.Emit){g.emitProxy, g.emitClient, cmd.SocketMetrics("client", g.outer)}
	if g.embedded != nil {
		reads = append(reads, cmd.ServerMetrics(g.embedded), cmd.SocketMetrics("server", []udp.Conn{g.inside}...))
	}
	return &cmd.Admin{
		Program: "anytun-proxy", Ready: g.ready, Facts: g.facts,
		Collectors: cmd.Collectors(reads...), Logger: g.log,
	}
}

func (g *gateway) ready() error {
	if g.draining.Load() {
		return errors.New("draining")
	}
	if !g.client.Status().Connected {
		return fmt.Errorf("no session with the server (%s)", g.serverName())
	}
	return nil
}

func (g *gateway) facts() []cmd.Fact {
	st, p := g.client.Status(), g.proxy.Stats()
	facts := []cmd.Fact{{Name: "server", Value: g.serverName()}}
	for _, l := range g.listeners {
		facts = append(facts, cmd.Fact{Name: "listening", Value: l.Addr().String()})
	}
	if st.Endpoint.IsValid() {
		facts = append(facts,
			cmd.Fact{Name: "server address", Value: st.Endpoint.String()},
			cmd.Fact{Name: "server number", Value: strconv.Itoa(int(st.Session.Server))},
			cmd.Fact{Name: "client number", Value: strconv.FormatUint(uint64(st.Session.Number), 10)},
			cmd.Fact{Name: "inner addresses", Value: st.Session.Addresses[0].String() + " " + st.Session.Addresses[1].String()},
			cmd.Fact{Name: "public addresses", Value: publicAddresses(st.Session)},
			cmd.Fact{Name: "ports", Value: ports(st)},
			cmd.Fact{Name: "mtu", Value: strconv.Itoa(st.Session.MTU)},
			cmd.Fact{Name: "round trip", Value: st.RTT.Round(time.Microsecond).String()},
			cmd.Fact{Name: "session since", Value: st.SessionSince.Format(time.RFC3339)},
			cmd.Fact{Name: "server changes", Value: strconv.FormatUint(st.ServerChanges, 10)},
			cmd.Fact{Name: "gaps", Value: gapsText(st)},
		)
	}
	return append(facts,
		cmd.Fact{Name: "connections", Value: strconv.FormatInt(p.OpenConns, 10)},
		cmd.Fact{Name: "udp associations", Value: strconv.FormatInt(p.OpenAssociations, 10)},
		cmd.Fact{Name: "bytes out", Value: strconv.FormatUint(p.BytesOut, 10)},
		cmd.Fact{Name: "bytes in", Value: strconv.FormatUint(p.BytesIn, 10)},
	)
}

// publicAddresses says what the world sees.
func publicAddresses(s client.Session) string {
	var all []string
	for _, a := range s.Public {
		if a.IsValid() {
			all = append(all, a.String())
		}
	}
	if len(all) == 0 {
		return "the server's"
	}
	return strings.Join(all, " ")
}

// ports lists the session's ports and those leased besides.
func ports(st client.Status) string {
	text := fmt.Sprintf("%d-%d", st.Session.FirstPort, st.Session.LastPort)
	for _, p := range st.Ports {
		text += fmt.Sprintf(" %d-%d", p.First, p.Last)
		if p.Public.IsValid() && p.Public != st.Session.Public[0] {
			text += " at " + p.Public.String()
		}
	}
	return text
}

// gapsText says how often nothing got through, and for how long.
func gapsText(st client.Status) string {
	if st.Gaps == 0 {
		return "none"
	}
	return fmt.Sprintf("%d, the last one of %v until %s, the longest of %v", st.Gaps,
		st.LastGap.Length.Round(time.Millisecond), st.LastGapEnd.Format(time.RFC3339), st.LongestGap.Round(time.Millisecond))
}

func (g *gateway) emitProxy(e *cmd.Emit) {
	s := g.proxy.Stats()
	e.Gauge("anytun_proxy_connections", "Open connections of applications.", float64(s.OpenConns))
	e.Gauge("anytun_proxy_tunnels", "Those that relay bytes.", float64(s.OpenTunnels))
	e.Gauge("anytun_proxy_associations", "Open SOCKS5 UDP associations.", float64(s.OpenAssociations))
	e.Counter("anytun_proxy_accepted_total", "Connections accepted.", s.Accepted)
	e.Counter("anytun_proxy_limit_waits_total", "Connections that had to wait because --max-connections were open.", s.LimitWaits)
	e.Counter("anytun_proxy_accept_errors_total", "Accepts that failed and were tried again.", s.AcceptErrors)
	e.Counter("anytun_proxy_bytes_total", "Bytes relayed.", s.BytesOut, "direction", "out")
	e.Counter("anytun_proxy_bytes_total", "Bytes relayed.", s.BytesIn, "direction", "in")
	e.Counter("anytun_proxy_datagrams_total", "UDP datagrams relayed.", s.DatagramsOut, "direction", "out")
	e.Counter("anytun_proxy_datagrams_total", "UDP datagrams relayed.", s.DatagramsIn, "direction", "in")
	e.Counter("anytun_proxy_idle_total", "What ended because nothing moved.", s.IdleTunnels, "kind", "tunnel")
	e.Counter("anytun_proxy_idle_total", "What ended because nothing moved.", s.IdleAssociations, "kind", "association")
	e.Counter("anytun_proxy_bind_strangers_total", "Connections to a BIND port from another address than the declared one.", s.BindStrangers)
	for kind, n := range s.Requests {
		e.Counter("anytun_proxy_requests_total", "Requests of applications.", n, "kind", kind)
	}
	for reason, n := range s.Failures {
		e.Counter("anytun_proxy_failures_total", "Requests and handshakes that failed.", n, "reason", reason)
	}
	e.Drops("anytun_proxy_dropped_total", "Datagrams of UDP associations that were dropped.", s.Drops)
}

func (g *gateway) emitClient(e *cmd.Emit) {
	s, st := g.client.Stats(), g.client.Status()
	connected := 0.0
	if st.Connected {
		connected = 1
	}
	e.Gauge("anytun_client_connected", "1 when there is a session and the server was heard lately.", connected)
	e.Gauge("anytun_client_round_trip_seconds", "Round trip of the last answered keep-alive.", st.RTT.Seconds())
	e.Counter("anytun_client_packets_in_total", "Inner packets from the server.", s.ReceivedPackets)
	e.Counter("anytun_client_bytes_in_total", "Bytes of those packets.", s.ReceivedBytes)
	e.Counter("anytun_client_packets_out_total", "Inner packets to the server.", s.SentPackets)
	e.Counter("anytun_client_bytes_out_total", "Bytes of those packets.", s.SentBytes)
	e.Counter("anytun_client_initiations_total", "Handshakes begun.", s.Initiations)
	e.Counter("anytun_client_handshakes_total", "Handshakes that succeeded.", s.Handshakes)
	e.Counter("anytun_client_dead_paths_total", "Times that nothing was heard for two keep-alive intervals.", s.DeadPaths)
	e.Counter("anytun_client_server_changes_total", "Times that packets began to come from another server.", s.ServerChanges)
	e.Gauge("anytun_client_server_number", "Number of the server that answers.", float64(st.Session.Server))
	suspect := 0.0
	if st.Suspect {
		suspect = 1
	}
	e.Gauge("anytun_client_suspect", "1 while something was asked for and nothing has come.", suspect)
	e.Counter("anytun_client_gaps_total", "Times in which nothing got through.", s.Gaps)
	e.Gauge("anytun_client_gap_seconds", "How long they were, all together.", s.GapTime.Seconds())
	e.Gauge("anytun_client_gap_last_seconds", "Length of the last one.", st.LastGap.Length.Seconds())
	e.Gauge("anytun_client_gap_longest_seconds", "Length of the longest one.", st.LongestGap.Seconds())
	e.Counter("anytun_client_keep_alives_total", "Keep-alives sent.", s.KeepAlives)
	e.Counter("anytun_client_probes_total", "Those that asked about a silence.", s.Probes)
	e.Gauge("anytun_client_leased_port_blocks", "Port blocks leased besides the client's own.", float64(len(st.Ports)))
	e.Counter("anytun_client_port_requests_total", "Requests for port blocks, and to renew them.", s.PortRequests)
	e.Counter("anytun_client_port_refusals_total", "Answers that gave no block though one was asked for.", s.PortRefusals)
	e.Drops("anytun_client_dropped_total", "Packets the client dropped.", s.Drops)
	if stack := g.tunnel.input.Load(); stack != nil {
		n := stack.Stats()
		e.Counter("anytun_client_ports_used_up_total", "Searches for a free port in vain.", n.PortsUsedUp)
		e.Counter("anytun_client_gap_resent_total", "Segments sent again the moment a gap ended.", n.GapResent)
		e.Counter("anytun_client_gap_nudged_total", "Connections whose peers were then asked to send again.", n.GapNudged)
		cmd.EmitStack(e, "client", n)
	}
}
