// Package auth replaces the module that checks user names and passwords in Traefik. No test uses passwords, so all are
// rejected.
package auth

import "net/http"

// CheckSecret returns false: every password is wrong.
func CheckSecret(password, secret string) bool { return false }

// BasicAuth is basic authentication.
type BasicAuth struct {
	Realm   string
	Secrets func(user, realm string) string
}

// RequireAuth responds with 401.
func (*BasicAuth) RequireAuth(w http.ResponseWriter, _ *http.Request) { reject(w) }

// DigestAuth is digest authentication.
type DigestAuth struct{}

// NewDigestAuthenticator returns an authenticator without users.
func NewDigestAuthenticator(string, func(user, realm string) string) *DigestAuth {
	return &DigestAuth{}
}

// CheckAuth finds no user.
func (*DigestAuth) CheckAuth(*http.Request) (string, *string) { return "", nil }

// RequireAuth responds with 401.
func (*DigestAuth) RequireAuth(w http.ResponseWriter, _ *http.Request) { reject(w) }

// RequireAuthStale responds with 401.
func (*DigestAuth) RequireAuthStale(w http.ResponseWriter, _ *http.Request) { reject(w) }

// DigestAuthParams returns nil.
func DigestAuthParams(string) map[string]string { return nil }

func reject(w http.ResponseWriter) { w.WriteHeader(http.StatusUnauthorized) }
