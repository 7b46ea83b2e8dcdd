package udp

import "syscall"

// Winsock's numbers; package syscall has few of them, and its ECONNREFUSED and
// the like are inventions that no call returns.
const (
	wsaeACCES        syscall.Errno = 10013
	wsaeINVAL        syscall.Errno = 10022
	wsaeMSGSIZE      syscall.Errno = 10040
	wsaeAFNOSUPPORT  syscall.Errno = 10047
	wsaeADDRNOTAVAIL syscall.Errno = 10049
	wsaeNETDOWN      syscall.Errno = 10050
	wsaeNETUNREACH   syscall.Errno = 10051
	wsaeNETRESET     syscall.Errno = 10052
	wsaeCONNRESET    syscall.Errno = 10054 // ICMP port unreachable, on UDP
	wsaeNOBUFS       syscall.Errno = 10055
	wsaeCONNREFUSED  syscall.Errno = 10061
	wsaeHOSTDOWN     syscall.Errno = 10064
	wsaeHOSTUNREACH  syscall.Errno = 10065
	errorPortUnreach syscall.Errno = 1234
	errorHostUnreach syscall.Errno = 1232
	errorNetUnreach  syscall.Errno = 1231
)

// dropReason sorts the errors that concern one datagram only.
func dropReason(errno syscall.Errno) (DropReason, bool) {
	switch errno {
	case wsaeMSGSIZE:
		return DropTooBig, true
	case wsaeNETDOWN, wsaeNETUNREACH, wsaeNETRESET, wsaeHOSTDOWN, wsaeHOSTUNREACH,
		errorHostUnreach, errorNetUnreach:
		return DropUnreachable, true
	case wsaeCONNRESET, wsaeCONNREFUSED, errorPortUnreach:
		return DropRefused, true
	case wsaeACCES:
		return DropDenied, true
	case wsaeNOBUFS:
		return DropQueueFull, true
	case wsaeINVAL, wsaeADDRNOTAVAIL, wsaeAFNOSUPPORT:
		return DropBadAddress, true
	}
	return 0, false
}
