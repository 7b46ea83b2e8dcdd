# Namespaces, cables and routes; sourced by bench. $P is the prefix of all names,
# which no other run has.
#
#                                              .2 srv .1 -- 10.71.3.0/24 -- .2, .3 dst
#   cli .2 -- 10.71.1.0/24 -- .1 rtr .1 -- 10.71.2.0/24                            .2
#                             .1 .1 .1 -- 10.71.5.0/24 -- .2 srv2 .1 -- 10.71.7.0/24
#                                 |                                                .2
#                                 +---------------- 10.71.6.0/24 ------------------+
#
# Traffic leaves the servers by sockets (10.71.3.1), by a TUN device (10.71.4.1,
# and 10.71.4.2 from both servers), or translated by the kernel of srv
# (10.71.3.9: the raw path, and tunnels that end in a device). Nothing else is
# known at dst, so what comes back did take the way that is measured. Only what
# the kernel translates is tracked by it.
#
# 10.71.8.1 is both servers' address. rtr sends each packet for it, and each for
# 10.71.4.2, which dst sends by 10.71.6.0/24, to a random one of the two.

SRV=10.71.2.2 SRV2=10.71.5.2 ANYCAST=10.71.8.1
DST=10.71.3.2
DST_ROUTED=10.71.3.3 # for tunnels whose client is a device: the route to it leads there
EGRESS=10.71.4.1 EGRESS_SPRAYED=10.71.4.2 EGRESS_BASE=10.71.4.3
ROUTED=10.99.0.0/16 # the inside of those tunnels
MTU=1500

NAMESPACES=(cli rtr srv srv2 dst)
CABLES=( # namespace device address, twice
  "cli c0 10.71.1.2  rtr r0 10.71.1.1"
  "rtr r1 10.71.2.1  srv s0 10.71.2.2"
  "rtr r2 10.71.5.1  srv2 t0 10.71.5.2"
  "srv s1 10.71.3.1  dst d0 10.71.3.2"
  "srv2 t1 10.71.7.1 dst d1 10.71.7.2"
  "rtr r3 10.71.6.1  dst d2 10.71.6.2"
)

in_ns() { # NAMESPACE COMMAND...
  local n=$1
  shift
  ip netns exec "$P$n" "$@"
}

topology_up() {
  local n cable
  for n in "${NAMESPACES[@]}"; do
    ip netns add "$P$n"
    in_ns "$n" ip link set lo up
    # Thousands of short connections a second from one address to another.
    in_ns "$n" sysctl -qw net.ipv4.ip_local_port_range="10000 65000" net.ipv4.tcp_tw_reuse=1 \
      net.core.somaxconn=4096 net.ipv4.tcp_max_syn_backlog=4096 \
      net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
  done
  for cable in "${CABLES[@]}"; do
    # shellcheck disable=SC2086 # six words
    set -- $cable
    ip link add "$2" netns "$P$1" mtu $MTU type veth peer name "$5" netns "$P$4" mtu $MTU
    in_ns "$1" ip addr add "$3/24" dev "$2"
    in_ns "$4" ip addr add "$6/24" dev "$5"
    in_ns "$1" ip link set "$2" up
    in_ns "$4" ip link set "$5" up
  done
  in_ns dst ip addr add $DST_ROUTED/24 dev d0
  in_ns srv ip addr add 10.71.3.9/24 dev s1
  in_ns srv ip addr add $ANYCAST/32 dev lo
  in_ns srv2 ip addr add $ANYCAST/32 dev lo
  for n in rtr srv srv2; do in_ns $n sysctl -qw net.ipv4.ip_forward=1; done

  in_ns cli ip route add default via 10.71.1.1
  in_ns srv ip route add default via 10.71.2.1
  in_ns srv2 ip route add default via 10.71.5.1
  in_ns srv2 ip route add 10.71.3.0/24 via 10.71.7.2
  in_ns rtr ip route add 10.71.3.0/24 via 10.71.2.2
  in_ns dst ip route add $EGRESS/32 via 10.71.3.1
  in_ns dst ip route add $EGRESS_BASE/32 via 10.71.3.1
  in_ns dst ip route add $EGRESS_SPRAYED/32 via 10.71.6.1 src $DST

  in_ns rtr ip route add default via 10.71.2.2 table 101
  in_ns rtr ip route add default via 10.71.5.2 table 102
  in_ns rtr ip rule add pref 1001 fwmark 1 lookup 101
  in_ns rtr ip rule add pref 1002 fwmark 2 lookup 102
  in_ns rtr nft -f - <<N
table ip spray {
  chain pre {
    type filter hook prerouting priority mangle
    iifname "r0" ip daddr $ANYCAST meta mark set numgen random mod 2 offset 1
    iifname "r3" ip daddr $EGRESS_SPRAYED meta mark set numgen random mod 2 offset 1
  }
}
N
  in_ns srv nft -f - <<N
table ip raw {
  chain pre {
    type filter hook prerouting priority raw
    ip daddr 10.71.3.9 accept
    ip saddr { 10.71.1.0/24, $ROUTED } ip daddr 10.71.3.0/24 accept
    notrack
  }
  chain out {
    type filter hook output priority raw
    notrack
  }
}
table ip translate {
  chain post {
    type nat hook postrouting priority srcnat
    oifname "s1" ip saddr { 10.71.1.0/24, $ROUTED } snat to 10.71.3.9
  }
}
N
  in_ns srv sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=3 \
    net.netfilter.nf_conntrack_tcp_timeout_close_wait=3 net.netfilter.nf_conntrack_tcp_timeout_last_ack=3 \
    net.netfilter.nf_conntrack_tcp_timeout_fin_wait=3
}

topology_down() {
  local n
  for n in "${NAMESPACES[@]}"; do ip netns del "$P$n" 2>/dev/null || true; done
}

# topology_mode super: as the kernel makes a veth, large packets stay whole.
# topology_mode wire: no offloads, so each packet on a cable has the size of the MTU.
topology_mode() {
  local cable on
  case $1 in
    super) on=on ;;
    wire) on=off ;;
    *)
      echo "MODE is super or wire, not $1" >&2
      return 1
      ;;
  esac
  for cable in "${CABLES[@]}"; do
    # shellcheck disable=SC2086 # six words
    set -- $cable
    for end in "$1 $2" "$4 $5"; do
      # shellcheck disable=SC2086 # two words
      set -- $end
      in_ns "$1" ethtool -K "$2" tso $on gso $on gro off tx-udp-segmentation $on >/dev/null 2>&1 ||
        { echo "ethtool can't turn offloads $on" >&2; return 1; }
    done
  done
}

# topology_delay MS LOSS: whatever crosses rtr to or from cli and srv passes the
# delay tool, which is what kernels without netem have.
topology_delay() {
  run_in rtr "$RUN/delay.log" delay -device delay0 -ms "$1" -loss "$2"
  DELAY=$STARTED
  wait_for "the delay tool" in_ns rtr ip link show delay0
  in_ns rtr ip link set delay0 mtu $MTU txqueuelen 10000 up
  in_ns rtr sysctl -qw net.ipv4.conf.delay0.rp_filter=0
  in_ns rtr ip route add default dev delay0 table 100
  in_ns rtr ip rule add pref 900 iif r0 lookup 100
  in_ns rtr ip rule add pref 900 iif r1 lookup 100
}

topology_undelay() {
  in_ns rtr ip rule del pref 900
  in_ns rtr ip rule del pref 900
  end_session "$DELAY"
}
