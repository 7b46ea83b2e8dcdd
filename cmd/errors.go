package cmd

import (
	"errors"
	"fmt"
	"io"
)

// Exit codes of both commands.
const (
	ExitDone    = 0 // ended as asked
	ExitFailure = 1 // failed at run time
	ExitUsage   = 2 // wrong usage or configuration
)

// Error is an error that ends a command: a sentence for the user, what to do
// about it, and the exit code.
type Error struct {
	Code int    // ExitFailure or ExitUsage
	Err  error  // what is wrong
	Hint string // what to do; may be empty
}

// Error returns what is wrong, without the hint.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Usage returns an error about the command line or the configuration. The
// format and its arguments are those of fmt.Errorf.
func Usage(hint, format string, args ...any) error {
	return &Error{Code: ExitUsage, Err: fmt.Errorf(format, args...), Hint: hint}
}

// Failure returns an error that happened at run time. The format and its
// arguments are those of fmt.Errorf.
func Failure(hint, format string, args ...any) error {
	return &Error{Code: ExitFailure, Err: fmt.Errorf(format, args...), Hint: hint}
}

// Report writes err and its hint to w as a user reads them, and returns the
// exit code. An error without a hint of its own counts as a failure at run time.
func Report(w io.Writer, program string, err error) int {
	if err == nil {
		return ExitDone
	}
	code, hint := ExitFailure, ""
	var e *Error
	if errors.As(err, &e) {
		code, hint = e.Code, e.Hint
	}
	fmt.Fprintf(w, "%s: error: %v\n", program, err)
	if hint != "" {
		fmt.Fprintf(w, "%s: hint: %s\n", program, hint)
	}
	return code
}

// Nearest returns the candidate that a misspelt word probably meant, or ""
// when none is close.
func Nearest(word string, candidates []string) string {
	best, bestDistance := "", len(word)/3+2
	for _, c := range candidates {
		if d := distance(word, c); d < bestDistance {
			best, bestDistance = c, d
		}
	}
	return best
}

// distance is the Levenshtein distance, with one row of the table kept.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// First returns the first of the errors that errors.Join put together, so that
// the user gets one sentence and its hint at a time.
func First(err error) error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()[0]
	}
	return err
}
