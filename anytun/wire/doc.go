// Package wire is the bytes of the anytun protocol: one file per message, each
// with a parser and an appender. It does no I/O, reads no clock and makes no
// decision; PROTOCOL.md in this folder is its text, and the section numbers in
// the comments are that document's.
//
// Parsers take a []byte and return views or small values; they never retain
// their argument and never allocate. Appenders extend the slice they are given.
package wire
