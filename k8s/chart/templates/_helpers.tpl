{{- define "sluice.name" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "sluice" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-sluice" (.Release.Name | trunc 33 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "sluice.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The webhook's cluster-wide name. It sorts after istio-, so that Istio's
     webhook is called first and its istio-proxy is there. */}}
{{- define "sluice.clusterName" -}}
sluice-injector.{{ .Release.Namespace }}
{{- end -}}

{{/* Labels that select a component's pods. Takes (list . "component"). */}}
{{- define "sluice.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ $.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "sluice.labels" -}}
{{- $ := index . 0 -}}
{{ include "sluice.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
{{- end -}}

{{/* A user ID, or "platform". Helm reads large numbers as floats. */}}
{{- define "sluice.user" -}}
{{- $user := default 65532 .Values.runAsUser -}}
{{- kindIs "string" $user | ternary $user ($user | int) -}}
{{- end -}}

{{- define "sluice.podSecurity" -}}
runAsNonRoot: true
{{- $user := include "sluice.user" . }}
{{- if ne $user "platform" }}
runAsUser: {{ $user }}
runAsGroup: {{ $user }}
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "sluice.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Scheduling of a component's pods. Takes (list . "component" values). */}}
{{- define "sluice.scheduling" -}}
{{- $ := index . 0 -}}
{{- with $.Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with index . 2 }}
{{- with .priorityClassName }}
priorityClassName: {{ quote . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "sluice.selector" . | nindent 8 }}
{{- end -}}
