//go:build linux

package lab

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// clusterHelpers are what this test binary can be on the cluster's hosts.
var clusterHelpers = map[string]func(args []string) error{
	"wire":   runWire,
	"answer": runAnswer,
	"ask":    runAsk,
}

// runAnswer is the helper "answer": ADDRESS NAME. It answers every datagram with
// its name and the address that asked, from the address that was asked.
func runAnswer(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("answer: %d arguments", len(args))
	}
	conn, err := net.ListenPacket("udp", args[0])
	if err != nil {
		return err
	}
	buf := make([]byte, 2048)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		reply := fmt.Appendf(nil, "%s %s ", args[1], from)
		_, _ = conn.WriteTo(append(reply, buf[:n]...), from)
	}
}

// runAsk is the helper "ask": ADDRESS COUNT. It asks runAnswer from as many
// sockets, one after the other, and prints the names of those that answered.
func runAsk(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("ask: %d arguments", len(args))
	}
	count, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	buf := make([]byte, 2048)
	for range count {
		conn, err := net.Dial("udp", args[0])
		if err != nil {
			return err
		}
		_, _ = conn.Write([]byte("?"))
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		if n, err := conn.Read(buf); err != nil {
			fmt.Println("nobody")
		} else {
			name, _, _ := strings.Cut(string(buf[:n]), " ")
			fmt.Println(name)
		}
		conn.Close()
	}
	return nil
}
