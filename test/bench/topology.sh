# Namespaces, cables and routes; sourced by bench. $P is the prefix of all names,
# which no other run has.
#
#                      .1 -- 10.71.10.0/24 -- .2 srv  .1 -- 10.71.20.0/24 -- .2
#   cli .2 -- .1 rtr   .1 -- 10.71.11.0/24 -- .2 base .1 -- 10.71.21.0/24 -- .2   dst
#   10.71.1.0/24       .1 -- 10.71.12.0/24 -- .2 one  .1 -- 10.71.22.0/24 -- .2   10.71.3.2
#                      .1 -- 10.71.13.0/24 -- .2 two  .1 -- 10.71.23.0/24 -- .2   10.71.3.3
#                      .1 ------------------ 10.71.6.0/24 ------------------ .2
#
# Nearly all servers run in srv. A host has one server of ours with a TUN device
# at most, so those that are compared with it have others, which are the same.
#
# Traffic leaves a server by sockets, by a TUN device (from 10.71.4.x), or
# translated by the kernel (to .9: the raw path, and tunnels that end in a
# device). dst has no other routes, so what comes back did take the way that is
# measured. The kernel of a server tracks what it translates, and nothing else.
#
# 10.71.8.1 is the address of both one and two. rtr sends each packet for it to a
# random one of them, and also each for their egress address, which reaches rtr
# by 10.71.6.0/24.

DST=10.71.3.2
DST_ROUTED=10.71.3.3 # for tunnels whose client is a device: the route to it leads there
ROUTED=10.99.0.0/16  # the inside of those tunnels
ANYCAST=10.71.8.1
declare -A ADDRESS=([srv]=10.71.10.2 [base]=10.71.11.2 [one]=10.71.12.2 [two]=10.71.13.2)
declare -A EGRESS=([srv]=10.71.4.1 [base]=10.71.4.2 [anycast]=10.71.4.3)
SRV=${ADDRESS[srv]}
SERVERS=(srv base one two)
NAMESPACES=(cli rtr "${SERVERS[@]}" dst)
MTU=1500

# Cables: namespace, device and address of both ends.
CABLES=("cli c0 10.71.1.2 rtr r0 10.71.1.1" "rtr r9 10.71.6.1 dst d9 10.71.6.2")
for i in "${!SERVERS[@]}"; do
  CABLES+=("rtr r1$i 10.71.1$i.1 ${SERVERS[i]} s0 10.71.1$i.2" "${SERVERS[i]} s1 10.71.2$i.1 dst d1$i 10.71.2$i.2")
done

in_ns() { # NAMESPACE COMMAND...
  local n=$1
  shift
  ip netns exec "$P$n" "$@"
}

topology_up() {
  local n cable i
  for n in "${NAMESPACES[@]}"; do
    ip netns add "$P$n"
    in_ns "$n" ip link set lo up
    # Thousands of short connections a second from one address to another.
    in_ns "$n" sysctl -qw net.ipv4.ip_local_port_range="10000 65000" net.ipv4.tcp_tw_reuse=1 \
      net.core.somaxconn=4096 net.ipv4.tcp_max_syn_backlog=4096 \
      net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
    if [ -n "$WINDOW" ]; then
      in_ns "$n" sysctl -qw net.ipv4.tcp_rmem="4096 131072 $((WINDOW << 20))" net.ipv4.tcp_wmem="4096 16384 $((WINDOW << 20))"
    fi
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
  in_ns cli ip route add default via 10.71.1.1
  in_ns rtr sysctl -qw net.ipv4.ip_forward=1
  in_ns rtr ip route add 10.71.3.0/24 via "$SRV"
  in_ns dst ip addr add $DST/32 dev lo
  in_ns dst ip addr add $DST_ROUTED/32 dev lo
  for i in "${!SERVERS[@]}"; do server_up "${SERVERS[i]}" "$i"; done
  in_ns dst ip route add "${EGRESS[srv]}/32" via 10.71.20.1
  in_ns dst ip route add "${EGRESS[base]}/32" via 10.71.21.1

  # Spraying.
  in_ns one ip addr add $ANYCAST/32 dev lo
  in_ns two ip addr add $ANYCAST/32 dev lo
  in_ns dst ip route add "${EGRESS[anycast]}/32" via 10.71.6.1
  in_ns rtr ip route add default via "${ADDRESS[one]}" table 101
  in_ns rtr ip route add default via "${ADDRESS[two]}" table 102
  in_ns rtr ip rule add pref 1001 fwmark 1 lookup 101
  in_ns rtr ip rule add pref 1002 fwmark 2 lookup 102
  in_ns rtr nft -f - <<N
table ip spray {
  chain pre {
    type filter hook prerouting priority mangle
    iifname "r0" ip daddr $ANYCAST meta mark set numgen random mod 2 offset 1
    iifname "r9" ip daddr ${EGRESS[anycast]} meta mark set numgen random mod 2 offset 1
  }
}
N
}

# server_up NAMESPACE NUMBER
server_up() {
  local near=10.71.1$2 far=10.71.2$2
  in_ns "$1" sysctl -qw net.ipv4.ip_forward=1
  in_ns "$1" ip route add default via "$near.1"
  in_ns "$1" ip route add 10.71.3.0/24 via "$far.2"
  in_ns "$1" ip addr add "$far.9/24" dev s1
  in_ns "$1" nft -f - <<N
table ip raw {
  chain pre {
    type filter hook prerouting priority raw
    ip daddr $far.9 accept
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
    oifname "s1" ip saddr { 10.71.1.0/24, $ROUTED } snat to $far.9
  }
}
N
  in_ns "$1" sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=3 \
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

# topology_delay MS LOSS: whatever crosses rtr to or from srv and base passes
# the delay tool, which is what kernels without netem have.
topology_delay() {
  run_in rtr "$RUN/delay.log" delay -device delay0 -ms "$1" -loss "$2"
  DELAY=$STARTED
  wait_for "the delay tool" in_ns rtr ip link show delay0
  in_ns rtr ip link set delay0 mtu $MTU txqueuelen 10000 up
  in_ns rtr sysctl -qw net.ipv4.conf.delay0.rp_filter=0
  delay_gro on
  in_ns rtr ip route add default dev delay0 table 100
  in_ns rtr ip rule add pref 900 iif r0 lookup 100
  in_ns rtr ip rule add pref 900 iif r10 lookup 100
  in_ns rtr ip rule add pref 900 iif r11 lookup 100
}

topology_undelay() {
  for _ in 1 2 3; do in_ns rtr ip rule del pref 900; done
  delay_gro off
  end_session "$DELAY"
}

# delay_gro on: the kernel joins what comes to rtr, so that the tool moves large
# packets; on the next cable they are what they were.
delay_gro() {
  local d
  for d in r0 r10 r11; do in_ns rtr ethtool -K $d gro "$1" rx-udp-gro-forwarding "$1" >/dev/null; done
}
