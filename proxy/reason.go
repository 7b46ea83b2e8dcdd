package proxy

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
)

// Reason says why a request failed. It is what the counters, the replies and the logs agree on.
type Reason uint8

// The reasons. The zero value is success.
const (
	ReasonNone            Reason = iota
	ReasonRefused                // the destination answered with a reset
	ReasonHostUnreachable        // no way to the host
	ReasonNetUnreachable         // no way to its network
	ReasonTimedOut               // no answer
	ReasonNotAllowed             // forbidden by the far end
	ReasonUnknownName            // the name does not exist
	ReasonNameFailure            // the name servers failed
	ReasonNameTimeout            // the name servers did not answer
	ReasonNoPorts                // our own ports are used up
	ReasonNotSupported           // the Network can't do it
	ReasonCommand                // a SOCKS command that does not exist here
	ReasonAddressType            // a SOCKS address type that does not exist
	ReasonMalformed              // bytes that are not the protocol they began as
	ReasonUnknownProtocol        // neither SOCKS nor HTTP
	ReasonHandshakeSlow          // the request was not complete in time
	ReasonAuth                   // wrong or missing user name and password
	ReasonLimit                  // one of our own limits
	ReasonCanceled               // the application hung up, or the proxy is ending
	ReasonOther
	reasonCount
)

// reasons is the one table from a reason to each protocol's way of saying it. SOCKS5 codes: RFC 1928 section 6; SOCKS4:
// 0x5b rejected or failed, 0x5d user ids differ; HTTP: RFC 9110 section 15; the error type of Proxy-Status: RFC 9209
// section 2.3.
var reasons = [reasonCount]struct {
	name   string
	socks5 byte
	socks4 byte
	status int
	http   string
	text   string
}{
	ReasonNone:            {"none", 0x00, 0x5a, 200, "", "it worked"},
	ReasonRefused:         {"refused", 0x05, 0x5b, 502, "connection_refused", "the destination refused the connection"},
	ReasonHostUnreachable: {"host_unreachable", 0x04, 0x5b, 502, "destination_unavailable", "the destination host is unreachable"},
	ReasonNetUnreachable:  {"net_unreachable", 0x03, 0x5b, 502, "destination_ip_unroutable", "the destination's network is unreachable"},
	ReasonTimedOut:        {"timed_out", 0x06, 0x5b, 504, "connection_timeout", "the destination did not answer in time"},
	ReasonNotAllowed:      {"not_allowed", 0x02, 0x5b, 403, "destination_ip_prohibited", "this destination is not allowed"},
	ReasonUnknownName:     {"unknown_name", 0x04, 0x5b, 502, "dns_error", "this host name does not exist"},
	ReasonNameFailure:     {"name_failure", 0x04, 0x5b, 502, "dns_error", "the host name could not be looked up"},
	ReasonNameTimeout:     {"name_timeout", 0x04, 0x5b, 504, "dns_timeout", "the host name's look-up was not answered in time"},
	ReasonNoPorts:         {"no_ports", 0x01, 0x5b, 503, "connection_limit_reached", "no local port is free"},
	ReasonNotSupported:    {"not_supported", 0x07, 0x5b, 501, "proxy_internal_error", "the network behind this proxy can't do this"},
	ReasonCommand:         {"bad_command", 0x07, 0x5b, 501, "http_request_denied", "this command does not exist here"},
	ReasonAddressType:     {"bad_address_type", 0x08, 0x5b, 400, "http_request_error", "this kind of address does not exist"},
	ReasonMalformed:       {"malformed", 0x01, 0x5b, 400, "http_request_error", "the request is malformed"},
	ReasonUnknownProtocol: {"unknown_protocol", 0x01, 0x5b, 400, "http_request_error", "neither SOCKS nor HTTP"},
	ReasonHandshakeSlow:   {"handshake_slow", 0x01, 0x5b, 408, "http_request_error", "the request was not complete in time"},
	ReasonAuth:            {"auth", 0x02, 0x5d, 407, "http_request_denied", "user name and password are needed"},
	ReasonLimit:           {"limit", 0x01, 0x5b, 503, "connection_limit_reached", "a limit of this proxy is reached"},
	ReasonCanceled:        {"canceled", 0x01, 0x5b, 503, "connection_terminated", "the request was given up"},
	ReasonOther:           {"other", 0x01, 0x5b, 502, "proxy_internal_error", "the destination could not be reached"},
}

// String is the reason's name in metrics and logs.
func (r Reason) String() string { return reasons[r].name }

// SOCKS5 is the reply code of RFC 1928 section 6.
func (r Reason) SOCKS5() byte { return reasons[r].socks5 }

// SOCKS4 is the reply code of a SOCKS4 server.
func (r Reason) SOCKS4() byte { return reasons[r].socks4 }

// Status is the HTTP status code.
func (r Reason) Status() int { return reasons[r].status }

// ProxyError is the error type for the Proxy-Status header, RFC 9209 section 2.3.
func (r Reason) ProxyError() string { return reasons[r].http }

// Text is one clause for a person.
func (r Reason) Text() string { return reasons[r].text }

// errnos is the one table from an error number to a reason.
var errnos = []struct {
	errno  syscall.Errno
	reason Reason
}{
	{syscall.ECONNREFUSED, ReasonRefused},
	{syscall.ECONNRESET, ReasonRefused}, // reset before the connection stood
	{syscall.EHOSTUNREACH, ReasonHostUnreachable},
	{syscall.EHOSTDOWN, ReasonHostUnreachable},
	{syscall.ENETUNREACH, ReasonNetUnreachable},
	{syscall.ENETDOWN, ReasonNetUnreachable},
	{syscall.ETIMEDOUT, ReasonTimedOut},
	{syscall.EACCES, ReasonNotAllowed},
	{syscall.EPERM, ReasonNotAllowed},
	{syscall.EADDRNOTAVAIL, ReasonNoPorts},
	{syscall.EADDRINUSE, ReasonNoPorts},
}

// ReasonOf classifies an error of a Network.
func ReasonOf(err error) Reason {
	if err == nil {
		return ReasonNone
	}
	if errors.Is(err, ErrHangUp) || errors.Is(err, context.Canceled) {
		return ReasonCanceled
	}
	if errors.Is(err, ErrNotSupported) {
		return ReasonNotSupported
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		switch {
		case dns.IsNotFound:
			return ReasonUnknownName
		case dns.IsTimeout:
			return ReasonNameTimeout
		}
		return ReasonNameFailure
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		for _, e := range errnos {
			if errno == e.errno {
				return e.reason
			}
		}
		return ReasonOther
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return ReasonTimedOut
	}
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		return ReasonTimedOut
	}
	return ReasonOther
}
