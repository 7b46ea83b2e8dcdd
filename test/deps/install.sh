#!/usr/bin/env bash
# Installs the Debian packages whose programs the tests talk to: those that are
# missing, once, without starting any of their services. Without root or apt-get
# it says what is missing; the tests that need it are then skipped by name.
#
# usage: install.sh [PROGRAM=PACKAGE]...      (more than the list below)
set -euo pipefail

# Daemons live in /usr/sbin, which an ordinary user's PATH leaves out.
export PATH="$PATH:/usr/sbin:/sbin"

wanted=(
  curl=curl git=git python3=python3-minimal ip=iproute2 nft=nftables
  setpriv=util-linux sysctl=procps nginx=nginx ssh=openssh-client
  sshd=openssh-server nc.openbsd=netcat-openbsd proxychains4=proxychains4
  unbound=unbound dig=bind9-dnsutils tcpdump=tcpdump openssl=openssl
  chromium=chromium fcgiwrap=fcgiwrap bird=bird2 tc=iproute2 ss=iproute2
  ethtool=ethtool iperf3=iperf3 nstat=iproute2 ping=iputils-ping
  traceroute=traceroute tracepath=iputils-tracepath
  "$@"
)

programs=() packages=()
for pair in "${wanted[@]}"; do
  if ! command -v "${pair%%=*}" >/dev/null; then
    programs+=("${pair%%=*}") packages+=("${pair#*=}")
  fi
done
if [ ${#packages[@]} -eq 0 ]; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "not installed: ${programs[*]}; the tests that need them are skipped" >&2
  echo "as root on Debian: apt-get install ${packages[*]}" >&2
  exit 0
fi

# A package's scripts ask policy-rc.d before they start a service: 101 is no.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi

export DEBIAN_FRONTEND=noninteractive
echo "installing ${packages[*]}"
log=$(mktemp)
if ! { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; } >"$log" 2>&1 </dev/null; then
  cat "$log" >&2
  echo "apt-get could not install ${packages[*]}" >&2
  exit 1
fi
rm -f "$log"
