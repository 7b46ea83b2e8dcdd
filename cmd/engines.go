package cmd

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/anytun-go/anytun/anytun/server"
	"github.com/anytun-go/anytun/anytun/udp"
	"github.com/anytun-go/anytun/netstack"
)

// Collectors turns functions that read counters into what an Admin wants.
func Collectors(reads ...func(*Emit)) []prometheus.Collector {
	list := make([]prometheus.Collector, 0, len(reads))
	for _, read := range reads {
		list = append(list, NewCollector(read))
	}
	return list
}

// Drops emits counters of dropped packets, one for each reason.
func (e *Emit) Drops(name, help string, byReason map[string]uint64, labels ...string) {
	for reason, n := range byReason {
		e.Counter(name, help, n, append([]string{"reason", reason}, labels...)...)
	}
}

// SocketMetrics reads the counters of outer UDP sockets. side is "client" or
// "server".
func SocketMetrics(side string, conns ...udp.Conn) func(*Emit) {
	return func(e *Emit) {
		var sum udp.Stats
		for _, conn := range conns {
			reader, ok := conn.(udp.StatsReader)
			if !ok {
				continue
			}
			s := reader.Stats()
			addTraffic(&sum.Received, s.Received)
			addTraffic(&sum.Sent, s.Sent)
			sum.Resent += s.Resent
			for i, n := range s.Drops {
				sum.Drops[i] += n
			}
		}
		for _, d := range []struct {
			direction string
			traffic   udp.Traffic
		}{{"in", sum.Received}, {"out", sum.Sent}} {
			labels := []string{"side", side, "direction", d.direction}
			e.Counter("anytun_udp_datagrams_total", "Datagrams of the outer sockets.", d.traffic.Datagrams, labels...)
			e.Counter("anytun_udp_bytes_total", "Payload of those datagrams.", d.traffic.Bytes, labels...)
			e.Counter("anytun_udp_messages_total", "Kernel messages that carried them: one or many datagrams each.", d.traffic.Messages, labels...)
			e.Counter("anytun_udp_calls_total", "System calls that moved at least one message.", d.traffic.Calls, labels...)
		}
		e.Counter("anytun_udp_resent_total", "Messages that the kernel would not cut and that were sent singly.", sum.Resent, "side", side)
		for i, n := range sum.Drops {
			e.Counter("anytun_udp_dropped_total", "Datagrams lost at the outer sockets.", n,
				"side", side, "reason", udp.DropReason(i).String())
		}
	}
}

func addTraffic(sum *udp.Traffic, t udp.Traffic) {
	sum.Datagrams += t.Datagrams
	sum.Bytes += t.Bytes
	sum.Messages += t.Messages
	sum.Calls += t.Calls
}

// EmitStack emits the counters of a netstack. side is "client" or "server".
func EmitStack(e *Emit, side string, s netstack.Stats) {
	label := []string{"side", side}
	e.Counter("anytun_netstack_packets_in_total", "Packets from the tunnel.", s.PacketsIn, label...)
	e.Counter("anytun_netstack_bytes_in_total", "Bytes of those packets.", s.BytesIn, label...)
	e.Counter("anytun_netstack_packets_out_total", "Packets to the tunnel.", s.PacketsOut, label...)
	e.Counter("anytun_netstack_bytes_out_total", "Bytes of those packets.", s.BytesOut, label...)
	e.Counter("anytun_netstack_delivered_total", "Packets handed to the stack after segments were joined.", s.Delivered, label...)
	e.Counter("anytun_netstack_batches_total", "Batches of packets to the tunnel.", s.Batches, label...)
	e.Gauge("anytun_netstack_tcp_established", "TCP connections that are established.", float64(s.TCPEstablished), label...)
	e.Counter("anytun_netstack_tcp_retransmits_total", "TCP segments sent again.", s.TCPRetransmits, label...)
	e.Counter("anytun_netstack_acks_superseded_total", "Acknowledgements left out because a higher one came with them.", s.AcksSuperseded, label...)
	e.Counter("anytun_netstack_acks_held_total", "Duplicate acknowledgements kept for a moment in case segments were only late.", s.AcksHeld, label...)
	e.Counter("anytun_netstack_acks_held_dropped_total", "Of those, left out because segments were only late.", s.AcksDropped, label...)
	e.Counter("anytun_netstack_acks_held_released_total", "Of those, handed to TCP, which then recovers.", s.AcksReleased, label...)
	e.Counter("anytun_netstack_losses_mended_total", "Stretches of lost data sent again by the device, without TCP noticing.", s.LossesMended, label...)
	e.Counter("anytun_netstack_tcp_resets_out_total", "TCP resets sent.", s.TCPResetsOut, label...)
	e.Counter("anytun_netstack_tcp_resets_in_total", "TCP resets received.", s.TCPResetsIn, label...)
	e.Counter("anytun_netstack_tcp_timeouts_total", "TCP connections given up because the peer was silent.", s.TCPTimeouts, label...)
	e.Counter("anytun_netstack_dns_queries_total", "Questions of the stack's resolvers.", s.DNSQueries, label...)
	e.Counter("anytun_netstack_dns_cache_hits_total", "Look-ups answered from a resolver's cache.", s.DNSCacheHits, label...)
	e.Drops("anytun_netstack_dropped_total", "Packets the stack dropped.", map[string]uint64{
		"malformed":    s.DropMalformed,
		"protocol":     s.DropProtocol,
		"foreign_icmp": s.DropForeignICMP,
		"oversize":     s.DropOversize,
		"no_room":      s.DropNoRoom,
		"closed":       s.DropClosed,
		"forward_full": s.TCPForwardFull,
		"udp_buffer":   s.UDPBufferErrors,
	}, label...)
}

// ServerMetrics reads the counters of a server engine.
func ServerMetrics(srv *server.Server) func(*Emit) {
	return func(e *Emit) {
		s := srv.Stats()
		e.Counter("anytun_server_packets_in_total", "Inner packets from clients.", s.ReceivedPackets)
		e.Counter("anytun_server_bytes_in_total", "Bytes of those packets.", s.ReceivedBytes)
		e.Counter("anytun_server_packets_out_total", "Inner packets to clients.", s.SentPackets)
		e.Counter("anytun_server_bytes_out_total", "Bytes of those packets.", s.SentBytes)
		e.Counter("anytun_server_handshakes_total", "Handshakes answered.", s.Handshakes)
		e.Counter("anytun_server_cookies_total", "Handshakes answered with a cookie, under load.", s.Cookies)
		e.Counter("anytun_server_derived_total", "Sessions derived from one of their packets.", s.Derived)
		e.Counter("anytun_server_learned_total", "Whereabouts of clients that another server told.", s.Learned)
		e.Counter("anytun_server_roamed_total", "Times that a client's outer endpoint changed.", s.Roamed)
		e.Gauge("anytun_server_sessions", "Sessions in the cache.", float64(s.Sessions))
		e.Gauge("anytun_server_clients_online", "Clients that were heard lately.", float64(s.Clients))
		e.Drops("anytun_server_dropped_total", "Packets the server dropped.", s.Drops)
		emitEgress(e, srv.Egress())
		if t, ok := srv.Tun(); ok {
			emitTun(e, t)
		}
	}
}

// emitTun emits the counters of egress by a TUN device.
func emitTun(e *Emit, s server.TunStats) {
	e.Counter("anytun_open_packets_total", "Packets of clients to the world (out) and back (in).", s.PacketsOut, "direction", "out")
	e.Counter("anytun_open_packets_total", "Packets of clients to the world (out) and back (in).", s.PacketsIn, "direction", "in")
	e.Counter("anytun_open_bytes_total", "Bytes of those packets.", s.BytesOut, "direction", "out")
	e.Counter("anytun_open_bytes_total", "Bytes of those packets.", s.BytesIn, "direction", "in")
	e.Counter("anytun_open_icmp_errors_total", "ICMP errors translated.", s.ErrorsOut, "direction", "out")
	e.Counter("anytun_open_icmp_errors_total", "ICMP errors translated.", s.ErrorsIn, "direction", "in")
	e.Counter("anytun_open_acks_superfluous_total", "Acknowledgements to clients that a later one in the same batch made superfluous.", s.Superfluous)
	e.Counter("anytun_open_hairpinned_total", "Packets between clients' public ports.", s.Hairpinned)
	e.Counter("anytun_open_pings_answered_total", "Pings to egress addresses answered.", s.Echoes)
	e.Counter("anytun_open_reassembled_total", "Datagrams put together from fragments.", s.Reassembled)
	e.Gauge("anytun_nat_mappings", "Mappings of clients that may use any port.", float64(s.NAT.Mappings))
	e.Counter("anytun_nat_created_total", "Mappings made here.", s.NAT.Created)
	e.Counter("anytun_nat_learned_total", "Mappings that another server told.", s.NAT.Learned)
	e.Counter("anytun_nat_expired_total", "Mappings that ended unused.", s.NAT.Expired)
	e.Drops("anytun_open_dropped_total", "Packets the tun egress dropped.", s.Drops)
}

func emitEgress(e *Emit, s server.EgressStats) {
	for _, k := range []struct {
		kind            string
		open            int
		opened, expired uint64
	}{
		{"tcp", s.FlowsTCP, s.TCPOpened, s.TCPExpired},
		{"udp", s.FlowsUDP, s.UDPOpened, s.UDPExpired},
		{"ping", s.FlowsPing, s.PingOpened, s.PingExpired},
	} {
		e.Gauge("anytun_egress_flows", "Open flows.", float64(k.open), "kind", k.kind)
		e.Counter("anytun_egress_opened_total", "Flows opened.", k.opened, "kind", k.kind)
		e.Counter("anytun_egress_expired_total", "Flows ended because they were idle.", k.expired, "kind", k.kind)
	}
	e.Gauge("anytun_egress_dials", "TCP connections being opened.", float64(s.Dials))
	e.Gauge("anytun_egress_clients", "Clients that have a flow.", float64(s.Clients))
	e.Counter("anytun_egress_evicted_total", "Idle flows given up for a new one of the same client.", s.Evicted)
	e.Drops("anytun_egress_dropped_total", "Flows and packets refused or dropped.", map[string]uint64{
		"not_running":    s.DropNotRunning,
		"malformed":      s.DropMalformed,
		"unknown_client": s.DropUnknownClient,
		"draining":       s.DropDraining,
		"forbidden":      s.DropForbidden,
		"client_full":    s.DropClientFull,
		"all_full":       s.DropAllFull,
		"dials_full":     s.DropDialsFull,
		"udp_no_socket":  s.UDPDropNoSocket,
		"udp_full":       s.UDPDropFull,
		"udp_send":       s.UDPDropSend,
		"udp_invalid":    s.UDPDropInvalid,
		"udp_forbidden":  s.UDPDropInForbidden,
		"udp_in":         s.UDPDropIn,
		"ping_fragment":  s.PingDropFragment,
		"ping_no_socket": s.PingDropNoSocket,
		"ping_send":      s.PingDropSend,
		"ping_stray":     s.PingDropStray,
		"ping_oversize":  s.PingDropOversize,
	})
	for result, n := range map[string]uint64{
		"refused":     s.TCPRefused,
		"unreachable": s.TCPUnreachable,
		"timed_out":   s.TCPTimedOut,
		"no_socket":   s.TCPNoSocket,
		"failed":      s.TCPDialFailed,
		"client_gone": s.TCPAcceptFailed,
	} {
		e.Counter("anytun_egress_tcp_failed_total", "TCP connections that could not be opened.", n, "result", result)
	}
	e.Counter("anytun_egress_tcp_resets_total", "TCP connections that ended with a reset or a time-out.", s.TCPReset)
	e.Counter("anytun_egress_tcp_bytes_total", "Payload of TCP connections.", s.TCPBytesUp, "direction", "up")
	e.Counter("anytun_egress_tcp_bytes_total", "Payload of TCP connections.", s.TCPBytesDown, "direction", "down")
	e.Counter("anytun_egress_udp_datagrams_total", "Datagrams relayed.", s.UDPPacketsOut, "direction", "up")
	e.Counter("anytun_egress_udp_datagrams_total", "Datagrams relayed.", s.UDPPacketsIn, "direction", "down")
	e.Counter("anytun_egress_udp_bytes_total", "Payload of those datagrams.", s.UDPBytesOut, "direction", "up")
	e.Counter("anytun_egress_udp_bytes_total", "Payload of those datagrams.", s.UDPBytesIn, "direction", "down")
	e.Counter("anytun_egress_udp_errors_total", "ICMP errors passed on to clients.", s.UDPErrors)
	e.Counter("anytun_egress_pings_total", "Echo requests and replies relayed.", s.PingOut, "direction", "up")
	e.Counter("anytun_egress_pings_total", "Echo requests and replies relayed.", s.PingIn, "direction", "down")
	EmitStack(e, "server", s.Stack)
}
